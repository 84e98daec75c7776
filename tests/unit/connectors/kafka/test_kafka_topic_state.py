"""TopicState without a broker: history, live records, and reassigned partitions."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest

from kronos_connectors.kafka.records import oldest_timestamp
from kronos_connectors.kafka.topic_state import DecodedRecord, TopicState
from kronos_stream.interfaces.feed import Checkpoint, Partition, PartitionBounds, Unreadable
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.candle_message import encode_candle
from kronos_stream.market.clock import ManualClock
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

MINUTE = 60_000
START = 1_718_709_300_000
NOW = START + 10_000 * MINUTE
TOPIC = "kronos.candles.1m.v1"
PARTITION = Partition(TOPIC, 0)
BTC, ETH = (Series.parse(f"kafka:{base}/USDT:1m") for base in ("BTC", "ETH"))
BTC_FIVE = Series.parse("kafka:BTC/USDT:5m")


@dataclass(frozen=True)
class Record:
    """The fields of a consumed record that are used."""

    offset: int
    key: bytes | None
    value: bytes | None
    timestamp: int = NOW
    headers: tuple[tuple[str, bytes], ...] = ()


class StateUnderTest(TopicState):
    """A topic state that collects what it emits; its only partition begins with offset 0."""

    def __init__(self, *series: Series, bars: int = 1_000, now: int = NOW) -> None:
        self.clock = ManualClock(now)
        self.partition_counts = {TOPIC: 1}
        self._emitted: list[DecodedRecord] = []
        super().__init__(
            "kronos",
            bars,
            self.clock,
            emit=self._emitted.append,
            partition_count=self.partition_counts.__getitem__,
        )
        self.follow(series or (BTC,))

    def assign(self) -> None:
        self.on_assigned([PARTITION])

    @property
    def pending(self) -> set[Partition]:
        """Assigned partitions that have to be started."""
        return self._assigned - self._active.keys()

    def start(
        self, end: int = 0, committed: int | None = None, *, first: int = 0, context_start: int = 0
    ) -> int:
        checkpoint = None if committed is None else Checkpoint(committed, "")
        bounds = PartitionBounds(first, end, context_start, checkpoint)
        return self.start_partition(PARTITION, bounds)

    def read(self, records: list[Record]) -> list[DecodedRecord]:
        """Emitted records."""
        self._emitted.clear()
        next_offset = records[-1].offset + 1 if records else 0
        self.on_records(PARTITION, [(one.offset, one) for one in records], next_offset)
        return self._emitted[:]

    def bars(self, series: Series = BTC) -> list[tuple[int, float]]:
        """The history: minute and close of each bar."""
        candles = self.history(series, 0, NOW)
        return [((candle.time - START) // MINUTE, candle.close) for candle in candles]


def _started(*series: Series, end: int = 0, committed: int | None = None) -> StateUnderTest:
    state = StateUnderTest(*series)
    state.assign()
    assert state.start(end, committed) == 0
    return state


def _candle(minute: int, close: float = 1.0) -> Candle:
    return Candle(START + minute * MINUTE, close, close, close, close, 1.0)


def _record(offset: int, minute: int, close: float = 1.0, series: Series = BTC) -> Record:
    return Record(offset, series.name.encode(), encode_candle(series, _candle(minute, close)))


def _minutes(records: list[DecodedRecord]) -> list[int]:
    return [(one.candle.time - START) // MINUTE for one in records if isinstance(one, Update)]


def test_records_before_the_assignment_are_history_and_later_ones_are_emitted() -> None:
    state = _started(end=3)
    assert "3 records" in state.unavailable_reason(BTC, "g")
    assert _minutes(state.read([_record(i, i) for i in range(5)])) == [3, 4]
    assert state.unavailable_reason(BTC, "g") == ""
    assert [minute for minute, _ in state.bars()] == [0, 1, 2, 3, 4]
    assert state.pending_checkpoints() == {PARTITION: Checkpoint(5, "")}


def test_records_before_the_start_offset_is_known_are_ignored() -> None:
    state = StateUnderTest()
    assert state.read([_record(7, 7)]) == []
    state.assign()
    assert state.read([_record(7, 7)]) == []
    assert "no partitions assigned yet" in state.unavailable_reason(BTC, "g")
    assert state.start() == 0
    assert _minutes(state.read([_record(0, 0)])) == [0]


def test_a_repeated_bar_is_emitted_again_and_replaces_the_earlier_one() -> None:
    state = _started()
    records = [_record(0, 0), _record(1, 2), _record(2, 1), _record(3, 2, 5.0), _record(4, 0)]
    assert _minutes(state.read(records)) == [0, 2, 1, 2, 0]
    assert state.bars() == [(0, 1.0), (1, 1.0), (2, 5.0)]


def test_records_of_other_series_are_not_decoded() -> None:
    state = _started()
    assert state.read([Record(0, ETH.name.encode(), b"{"), _record(1, 1)])[0] == (
        Update(BTC, _candle(1), closed=True, received=NOW)
    )
    assert state.read([Record(2, None, encode_candle(ETH, _candle(1)))]) == []


@pytest.mark.parametrize(
    ("key", "value", "series", "reason"),
    [
        (BTC.name.encode(), b"{", BTC, "Invalid JSON"),
        (BTC.name.encode(), None, BTC, "without a value"),
        (
            BTC.name.encode(),
            encode_candle(ETH, _candle(0)),
            BTC,
            "kafka:ETH/USDT:1m",
        ),
        (BTC.name.encode(), encode_candle(BTC, _candle(0, -1.0)), BTC, "is not a price"),
        (None, b"{}", None, "required"),
        (
            b"BTC",
            encode_candle(BTC, _candle(0)).replace(BTC.name.encode(), b"BTC"),
            None,
            "series 'BTC'",
        ),
        (BTC_FIVE.name.encode(), b"{}", BTC_FIVE, "in the topic for 1m candles"),
        (
            None,
            encode_candle(BTC_FIVE, Candle(START, 1.0, 1.0, 1.0, 1.0, 1.0)),
            BTC_FIVE,
            "in the topic for 1m candles",
        ),
    ],
)
def test_invalid_records_are_rejected_with_their_place(
    key: bytes | None, value: bytes | None, series: Series | None, reason: str
) -> None:
    state = _started()
    emitted = state.read([Record(0, key, value), _record(1, 1)])
    rejected = emitted[0]
    assert isinstance(rejected, Unreadable)
    assert (rejected.series, rejected.raw) == (series, value or b"")
    assert rejected.reason.startswith(f"{TOPIC}[0]@0: ")
    assert reason in rejected.reason
    assert _minutes(emitted) == [1]
    assert [minute for minute, _ in state.bars()] == [1]


def test_the_message_names_the_series_if_the_key_does_not() -> None:
    emitted = _started().read([Record(0, b"BTC", encode_candle(BTC, _candle(0)))])
    assert _minutes(emitted) == [0]


def test_committed_records_are_not_rejected_again() -> None:
    bad = [Record(offset, BTC.name.encode(), b"{") for offset in range(4)]
    assert len(_started(end=4, committed=3).read(bad)) == 1
    assert len(_started(end=4).read(bad)) == 4
    # A topic that was created again has fewer records than were committed.
    assert len(_started(end=4, committed=9).read(bad)) == 4
    state = _started()
    assert len(state.read(bad)) == 4
    assert state.read(bad) == []
    assert state.follow([BTC, ETH]) == {TOPIC}  # reads them again, for ETH
    assert state.start(4) == 0
    assert state.read(bad) == []


def test_an_open_bar_is_emitted_but_not_history() -> None:
    state = _started()
    value = encode_candle(BTC, _candle(0), closed=False)
    emitted = state.read([Record(0, BTC.name.encode(), value)])
    assert emitted == [Update(BTC, _candle(0), closed=False, received=NOW)]
    assert state.bars() == []


def test_bars_of_the_future_do_not_displace_real_ones() -> None:
    state = StateUnderTest(bars=3, now=START + 3 * MINUTE - 1)
    state.assign()
    state.start()
    state.read([_record(minute, minute) for minute in range(3)])
    # Marked as closed, but not closed yet by our clock.
    assert not state.history(BTC, START + 2 * MINUTE, NOW)
    state.clock.advance(START + 3 * MINUTE)
    assert state.history(BTC, START + 2 * MINUTE, NOW)
    state.read([_record(3 + i, 900 + i) for i in range(9)])
    assert [minute for minute, _ in state.bars()] == [0, 1, 2]


@pytest.mark.parametrize(
    ("context_start", "end", "expected"),
    [(40, 100, 40), (100, 100, 5), (2, 100, 5), (0, 3_000_000, 2_000_000)],
)
def test_history_is_limited_in_age_and_number(context_start: int, end: int, expected: int) -> None:
    """Without an offset by time, which some brokers do not know, everything is read back."""
    state = StateUnderTest(bars=10)
    state.assign()
    assert state.start(end, first=5, context_start=context_start) == expected


def test_age_of_history_is_counted_in_bars() -> None:
    assert oldest_timestamp(BTC.timeframe, 10, NOW) == NOW - 10 * MINUTE
    assert oldest_timestamp(Timeframe(1, "M"), 1_000, NOW) == 0


def test_a_partition_that_returns_continues_where_it_stopped() -> None:
    state = _started()
    state.read([_record(0, 0), _record(1, 1)])
    state.on_revoked()
    state.assign()
    assert state.start(4, 9, context_start=1) == 2
    assert _minutes(state.read([_record(2, 2), _record(3, 3)])) == [2, 3]
    assert state.unavailable_reason(BTC, "g") == ""


def test_a_partition_that_returns_late_is_read_back_like_a_new_one() -> None:
    state = _started()
    state.read([_record(0, 0)])
    state.on_revoked()
    state.assign()
    assert state.start(5_000, 1, context_start=4_000) == 4_000
    assert state.read([_record(4_000, 4_000)]) == []


def test_history_is_read_for_a_new_series_without_repeating_others() -> None:
    state = _started()
    records = [_record(i, i, series=(BTC, ETH)[i % 2]) for i in range(6)]
    assert _minutes(state.read(records)) == [0, 2, 4]
    assert state.follow([BTC, ETH]) == {TOPIC}
    assert state.pending == {PARTITION}
    assert state.start(7) == 0
    records.append(_record(6, 6, series=ETH))
    assert _minutes(state.read(records)) == [6]
    assert [minute for minute, _ in state.bars(ETH)] == [1, 3, 5, 6]
    assert state.pending_checkpoints() == {PARTITION: Checkpoint(7, "")}
    assert state.follow([ETH]) == set()
    assert not state.pending
    assert state.bars() == []


def test_a_topic_that_is_followed_again_is_read_back() -> None:
    state = _started()
    state.read([_record(0, 0)])
    state.follow([])
    assert not state.timeframes
    state.on_revoked()
    state.follow([BTC])
    state.assign()
    assert state.start(1) == 0
    state.read([_record(0, 0)])
    assert state.bars() == [(0, 1.0)]


def test_history_is_unavailable_for_a_series_in_a_partition_of_another_member() -> None:
    state = StateUnderTest(BTC, ETH)
    state.partition_counts[TOPIC] = 2
    state.assign()
    state.start(1)
    state.read([_record(0, 0)])
    assert state.unavailable_reason(BTC, "g") == ""  # its record was in our partition
    assert "1 of its 2 partitions are assigned to us" in state.unavailable_reason(ETH, "g")
    assert state.shared_topics == [TOPIC]
    other = Partition(TOPIC, 1)
    state.on_assigned([PARTITION, other])
    assert state.pending == {other}
    state.start_partition(other, PartitionBounds(0, 0, 0, None))
    assert state.unavailable_reason(ETH, "g") == ""
    assert state.shared_topics == []


def test_offsets_without_records_complete_the_history() -> None:
    state = _started(end=2)
    state.read([_record(0, 0)])
    assert "1 records" in state.unavailable_reason(BTC, "g")
    state.on_records(PARTITION, (), 2)  # a transaction marker
    assert state.unavailable_reason(BTC, "g") == ""
    state.on_checkpointed(state.pending_checkpoints())
    assert state.pending_checkpoints() == {}


@pytest.mark.parametrize("seed", range(200))
def test_random_rebalances_lose_and_repeat_nothing(seed: int) -> None:
    """One partition, records of two series, and a group that reassigns it at any moment."""
    random = Random(seed)
    log: list[Record] = []
    state = StateUnderTest(BTC)
    emitted: list[DecodedRecord] = []
    latest: dict[int, float] = {}
    position, first_end, both = 0, -1, False
    for _ in range(random.randrange(20, 120)):
        action = random.randrange(8)
        if action < 3:
            series = random.choice((BTC, ETH))
            minute, close = random.randrange(50), float(random.randrange(1, 9))
            if series == BTC:
                latest[minute] = close
            log.append(_record(len(log), minute, close, series))
        elif action < 6:
            batch = log[position : position + random.randrange(5)]
            if PARTITION in state._active:
                position += len(batch)
            emitted += state.read(batch)
        elif action == 6:
            both = not both
            state.follow([BTC, ETH] if both else [BTC])
        else:
            state.on_revoked()
            state.assign()
        if state.pending and random.random() < 0.7:
            first_end = len(log) if first_end < 0 else first_end
            position = state.start(len(log))
    if state.pending or not state._active:
        state.assign()
        first_end = len(log) if first_end < 0 else first_end
        position = state.start(len(log))
    emitted += state.read(log[position:])

    assert state.unavailable_reason(BTC, "g") == ""
    assert state.bars() == sorted(latest.items())
    expected = [record for record in log[first_end:] if record.key == BTC.name.encode()]
    actual = [one for one in emitted if isinstance(one, Update) and one.series == BTC]
    assert [encode_candle(BTC, one.candle) for one in actual] == [one.value for one in expected]
