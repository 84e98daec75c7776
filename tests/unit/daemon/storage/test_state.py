"""Bars, watermarks, outcomes and outbox records in the state file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kronos_stream.daemon.requests import Outcome
from kronos_stream.daemon.storage.database import StateError
from kronos_stream.daemon.storage.state import Backlog, State
from kronos_stream.interfaces.sink import Envelope, Record
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.series import Series

A, B = Series.parse("v:A/X:1m"), Series.parse("v:B/X:1m")


def bar(minute: int, close: float = 1.0, amount: float | None = 2.5, **more: int) -> Bar:
    return Bar(Candle(60_000 * minute, 1.0, 2.0, 0.5, close, 3.0, amount), **more)  # type: ignore[arg-type]


def outcome(series: Series, minute: int, revision: int = 0) -> Outcome:
    return Outcome(series.name, 60_000 * minute, revision, "forecast")


def envelope(number: int) -> Envelope:
    return Envelope("forecast", A.name, b"%d" % number, (("ce_id", b"x"),))


_INVALID = envelope(3)._replace(value=None)  # type: ignore[arg-type]
"""An envelope that SQLite rejects."""


async def put(state: State, sink: str, *numbers: int) -> list[Record]:
    """Put an envelope for each number into the outbox of a sink, created at 1000 + number ms."""
    records = []
    for number in numbers:
        created = 1_000 + number
        records += await state.record([], [envelope(number)], sinks=[sink], created=created)
    return [record for _, record in records]


@pytest.fixture
async def state(tmp_path: Path) -> AsyncIterator[State]:
    opened = await State.open(tmp_path / "deep" / "state.sqlite")
    yield opened
    await opened.close()


async def test_bars_are_loaded_as_saved(state: State) -> None:
    bars = [bar(1), bar(2, amount=None), bar(3, revision=4, synthetic=True, received=99)]
    await state.save_bars([(A, one) for one in bars] + [(B, bar(9))])
    assert await state.load(A, 10) == bars
    assert await state.load(A, 2) == bars[1:]
    assert await state.load(A, 2, until=120_000) == bars[:2]
    assert await state.load(Series.parse("v:C/X:1m"), 5) == []


async def test_revised_bar_replaces_the_old_one(state: State) -> None:
    await state.save_bars([(A, bar(1))])
    await state.save_bars([(A, bar(1, close=1.5, revision=1))])
    assert await state.load(A, 5) == [bar(1, close=1.5, revision=1)]


async def test_watermark_is_set_once_and_only_advances(state: State) -> None:
    assert await state.watermark(A) is None
    await state.init_watermark(A, 60_000)
    await state.init_watermark(A, 600_000)
    assert await state.watermark(A) == (60_000, 0)
    await state.record([outcome(A, 3), outcome(A, 3, 1)], [])
    await state.record([outcome(A, 2)], [])
    assert await state.watermark(A) == (180_000, 1)
    assert await state.watermark(B) is None


async def test_bar_has_one_outcome(state: State) -> None:
    await state.record([outcome(A, 1)], [])
    await state.record([outcome(A, 1)._replace(result="skipped", reason="gap")], [])
    assert await state.outcomes(A, 0) == [outcome(A, 1)]
    assert await state.outcomes(A, 60_001) == []


async def test_records_are_kept_per_sink_in_order_until_delivered(state: State) -> None:
    both = await state.record([], [envelope(1)], sinks=["k", "m"], created=1_001)
    assert [(sink, record.value) for sink, record in both] == [("k", b"1"), ("m", b"1")]
    ours = [both[0][1], *await put(state, "k", 3)]
    assert await state.undelivered("k", 10) == ours
    assert await state.undelivered("k", 1) == ours[:1]
    assert await state.undelivered("k", 10, size=1) == ours[:1]
    assert await state.backlogs() == {"k": Backlog(2, 1_001), "m": Backlog(1, 1_001)}
    assert await state.mark_delivered("k", ours[0].sequence) == []
    assert await state.undelivered("k", 10) == ours[1:]
    assert await state.backlogs() == {"k": Backlog(1, 1_003), "m": Backlog(1, 1_001)}


async def test_delivery_and_its_dead_letters_are_one_transaction(state: State) -> None:
    [first] = await put(state, "k", 1)
    with pytest.raises(StateError):
        await state.mark_delivered("k", first.sequence, [envelope(2), _INVALID])
    assert await state.undelivered("k", 10) == [first]
    [letter] = await state.mark_delivered("k", first.sequence, [envelope(2)], created=1_002)
    assert letter[1:] == (*envelope(2), 1_002)
    assert await state.undelivered("k", 10) == [letter]


async def test_old_records_expire_from_the_front_in_batches(state: State) -> None:
    records = await put(state, "k", 1, 2, 3, 9, 4)
    await put(state, "m", 1)
    assert await state.expire("k", 1_005, limit=2) == (2, records[1].sequence)
    assert await state.expire("k", 1_005, limit=2) == (1, records[2].sequence)
    assert await state.expire("k", 1_005, limit=2) == (0, 0)  # records after a newer one stay
    assert await state.undelivered("k", 10) == records[3:]
    assert len(await state.undelivered("m", 10)) == 1


async def test_sequences_are_never_reused(state: State) -> None:
    [first] = await put(state, "k", 1)
    await state.mark_delivered("k", first.sequence)
    [second] = await put(state, "k", 2)
    assert second.sequence > first.sequence


async def test_failed_transaction_is_rolled_back(state: State) -> None:
    with pytest.raises(StateError):
        await state.record([outcome(B, 1)], [envelope(1), _INVALID], sinks=["k"])
    assert await state.outcomes(B, 0) == []
    assert await state.backlogs() == {}
    await state.save_bars([(A, bar(1))])
    await state.record([outcome(B, 1)], [])  # the id of B was discarded with the rollback
    assert await state.outcomes(B, 0) == [outcome(B, 1)]
    assert await state.load(B, 9) == []


async def test_prune_keeps_the_newest(state: State) -> None:
    await state.save_bars([(A, bar(i)) for i in range(10)] + [(B, bar(1))])
    await state.record([outcome(A, i) for i in range(10)], [])
    await state.prune(3, 8 * 60_000)
    assert [one.candle.time for one in await state.load(A, 99)] == [420_000, 480_000, 540_000]
    assert len(await state.load(B, 99)) == 1
    assert await state.outcomes(A, 0) == [outcome(A, 8), outcome(A, 9)]
    assert await state.watermark(A) == (540_000, 0)


async def test_prune_returns_space_to_the_disk(tmp_path: Path) -> None:
    state = await State.open(tmp_path / "state.sqlite")
    big = envelope(1)._replace(value=bytes(100_000))
    for _ in range(30):
        records = await state.record([], [big] * 10, sinks=["k"])
    await state.mark_delivered("k", records[-1][1].sequence)
    await state.prune(1, 0)
    await state.close()
    assert state.path.stat().st_size < 20_000_000


async def test_prune_lets_other_calls_run_between_batches(state: State) -> None:
    await state.save_bars([(A, bar(i)) for i in range(10_001)])
    await state.record([outcome(A, i) for i in (*range(5_000), 10_000)], [])
    pruning = asyncio.create_task(state.prune(10, 4_999 * 60_000))
    await asyncio.sleep(0)
    assert await state.watermark(A) == (10_000 * 60_000, 0)
    assert not pruning.done()  # the other call ran between two batches
    await pruning
    assert len(await state.load(A, 99)) == 10
    assert await state.outcomes(A, 0) == [outcome(A, 4_999), outcome(A, 10_000)]


async def test_prune_keeps_bars_without_an_outcome_and_their_contexts(state: State) -> None:
    await state.save_bars([(A, bar(i)) for i in range(10)])
    await state.init_watermark(A, 4 * 60_000)
    await state.prune(3, 0)
    assert [one.candle.time // 60_000 for one in await state.load(A, 99)] == list(range(2, 10))
