"""Records that make a broker disconnect."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from kronos_connectors.mqtt.poison import PoisonTracker


@given(st.sets(st.integers(0, 40), max_size=3), st.integers(1, 12), st.randoms())
def test_only_poison_records_are_identified(poison: set[int], window: int, random: Random) -> None:
    """A broker disconnects because of some records, and other pending ones become suspects."""
    tracker, acknowledged = PoisonTracker(), set[int]()
    records = list(range(20))
    refused: list[int] = []
    for _ in range(200):
        pending: list[int] = []
        for record in records:
            if tracker.poison_reason(record):
                continue
            if tracker.is_suspect(record) or len(pending) >= window:
                acknowledged.update(pending)
                pending.clear()
            pending.append(record)
            if record in poison:
                # Any number of the earlier ones may have been acknowledged.
                answered = random.randint(0, len(pending) - 1)
                tracker.on_disconnected(pending[answered:], "too large")
                break
            if tracker.is_suspect(record):
                acknowledged.update(pending)
                pending.clear()
        else:
            refused = [record for record in records if tracker.poison_reason(record)]
            break
    assert set(refused) == poison & set(records)
    assert acknowledged.isdisjoint(refused)
    tracker.discard(records)
    assert not any(
        tracker.is_suspect(record) or tracker.poison_reason(record) for record in records
    )


def test_first_disconnect_makes_a_record_only_suspect() -> None:
    tracker = PoisonTracker()
    tracker.on_disconnected([7], "protocol error")
    assert tracker.is_suspect(7)
    assert tracker.poison_reason(7) is None
    tracker.on_disconnected([7], "packet too large")
    assert tracker.poison_reason(7) == "packet too large"
