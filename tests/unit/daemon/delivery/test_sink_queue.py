"""Delivery to one sink: at least once and in order, whatever the sink does; bounded memory."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from kronos_stream.daemon.delivery.outbox import Outbox
from kronos_stream.daemon.delivery.sink_queue import BATCH_BYTES, MEMORY_BYTES
from kronos_stream.daemon.storage.state import State
from kronos_stream.forecast.message import DeadLetter
from kronos_stream.interfaces.sink import Record, Refusal, SinkUnavailable
from tests.support.outbox import START, MemorySink, numbered_envelope, run_outbox, sample


@pytest.mark.parametrize("seed", range(5))
def test_failures_cause_duplicates_but_keep_order_and_records(tmp_path: Path, seed: int) -> None:
    sink, random = MemorySink(), Random(seed)

    async def fault(records: Sequence[Record]) -> Sequence[Refusal]:
        await asyncio.sleep(random.choice([0.0, 0.3, 90.0]))
        if random.random() < 0.4:
            part = records[: random.randrange(len(records) + 1)]
            sink.delivered += [int(record.value) for record in part]
            raise random.choice([SinkUnavailable("lost"), RuntimeError("a bug"), OSError("gone")])
        return ()

    sink.fault = fault

    async def body(outbox: Outbox, _: State) -> None:
        for i in range(100):
            await outbox.publish([], [numbered_envelope(i)])
            await asyncio.sleep(random.random())
        assert await outbox.drain(100_000) == 0

    run_outbox(tmp_path / "s", [sink], body, seed=seed)
    assert list(dict.fromkeys(sink.delivered)) == list(range(100))


def test_long_outage_is_kept_on_disk_and_delivered_in_order(tmp_path: Path) -> None:
    sink = MemorySink()
    sink.down = True

    async def body(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [numbered_envelope(0)])
        await asyncio.sleep(60)
        await publish(outbox, 1, 90_000)
        tracemalloc.start()
        await publish(outbox, 90_000, 100_000)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert held < 2_000_000  # of 5 MB published
        assert await outbox.drain(0) == 100_000
        sink.down = False
        for i in range(100_000, 100_500):
            await outbox.publish([], [numbered_envelope(i)])
            await asyncio.sleep(0.05)
        assert await outbox.drain(1_000) == 0

    async def publish(outbox: Outbox, first: int, last: int) -> None:
        for start in range(first, last, 1_000):
            padded = [numbered_envelope(i, 500) for i in range(start, min(start + 1_000, last))]
            await outbox.publish([], padded)

    run_outbox(tmp_path / "s", [sink], body)
    assert sink.delivered == list(range(100_500))


def test_memory_and_batches_are_bounded_in_bytes(tmp_path: Path) -> None:
    sink = MemorySink()
    sink.down = True
    most = 0

    async def measure(records: Sequence[Record]) -> Sequence[Refusal]:
        nonlocal most
        most = max(most, sum(len(record.value) for record in records))
        return ()

    sink.fault = measure

    async def body(outbox: Outbox, _: State) -> None:
        tracemalloc.start()
        for i in range(60):
            await outbox.publish([], [numbered_envelope(i, 1_000_000)])
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert held < MEMORY_BYTES + 2_000_000
        sink.down = False
        assert await outbox.drain(60) == 0

    run_outbox(tmp_path / "s", [sink], body)
    assert sink.delivered == list(range(60))
    assert 1_000_000 < most < BATCH_BYTES + 1_100_000


def test_refused_record_becomes_a_dead_letter(tmp_path: Path) -> None:
    sink = MemorySink()

    async def refuse(records: Sequence[Record]) -> Sequence[Refusal]:
        return [
            Refusal(record, "too big")
            for record in records
            if record.value == b"3" or record.kind == "deadletter"
        ]

    sink.fault = refuse

    async def body(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [numbered_envelope(i) for i in range(6)])
        assert await outbox.drain(60) == 0

    run_outbox(tmp_path / "s", [sink], body)
    assert sink.delivered == [0, 1, 2, 4, 5]
    assert sink.dead_letters == []  # the dead letter was refused too, and dropped

    sink.delivered.clear()

    async def refuse_one(records: Sequence[Record]) -> Sequence[Refusal]:
        return [Refusal(record, "too big") for record in records if record.value == b"3"]

    sink.fault = refuse_one
    run_outbox(tmp_path / "s", [sink], body)
    (letter,) = map(DeadLetter.parse, sink.dead_letters)
    assert (letter.what, letter.reason, letter.sink) == ("record", "too big", "memory")
    assert (letter.series, letter.content()) == ("v:0/X:1m", b"3")


def test_old_records_expire(tmp_path: Path) -> None:
    sink = MemorySink()
    sink.down = True

    async def body(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [numbered_envelope(i) for i in range(5_000)])
        await asyncio.sleep(90)
        await outbox.publish([], [numbered_envelope(5_000)])
        await asyncio.sleep(20)
        assert await outbox.drain(0) == 1
        sink.down = False
        assert await outbox.drain(60) == 0

    metrics = run_outbox(tmp_path / "s", [sink], body, max_age_seconds=100)
    assert sink.delivered == [5_000]
    assert sample(metrics, "expired_total", sink="memory") == 5_000


def test_queue_depth_age_and_latency_are_measured(tmp_path: Path) -> None:
    sink = MemorySink()

    async def body(outbox: Outbox, _: State) -> None:
        await asyncio.sleep(1)
        sink.down = True
        await outbox.publish(
            [], [numbered_envelope(1), numbered_envelope(2)], received=[START, START]
        )
        await asyncio.sleep(30)
        measured = outbox._queues["memory"]._metrics
        assert sample(measured, "queue_depth", queue="outbox:memory") == 2
        assert sample(measured, "outbox_age_seconds", sink="memory") == 30
        sink.down = False
        assert await outbox.drain(60) == 0
        assert sample(measured, "queue_depth", queue="outbox:memory") == 0
        assert sample(measured, "outbox_age_seconds", sink="memory") == 0

    measured = run_outbox(tmp_path / "s", [sink], body)
    assert sample(measured, "delivered_total", sink="memory", kind="forecast") == 2
    assert (sample(measured, "sink_failures_total", sink="memory") or 0) > 3
    seconds = sample(measured, "received_to_published_seconds_sum", sink="memory")
    assert seconds is not None
    assert 60 <= seconds <= 80  # two records, 30 to 40 s each


def test_hanging_delivery_times_out_and_is_retried(tmp_path: Path) -> None:
    slow, quick = MemorySink("slow"), MemorySink("quick")
    hung = 0

    async def fault(_: Sequence[Record]) -> Sequence[Refusal]:
        nonlocal hung
        hung += 1
        if hung <= 2:
            await asyncio.sleep(10_000)
        return ()

    slow.fault = fault

    async def body(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [numbered_envelope(1)])
        await asyncio.sleep(0.01)
        assert quick.delivered == [1]
        await asyncio.sleep(61)
        assert outbox.problems() == {"slow": "no answer in 60 s", "quick": ""}
        assert await outbox.drain(180) == 0

    run_outbox(tmp_path / "s", [slow, quick], body)
    assert slow.delivered == [1]


def test_sink_that_cancels_itself_is_retried(tmp_path: Path) -> None:
    sink = MemorySink()
    tries = 0

    async def fault(_: Sequence[Record]) -> Sequence[Refusal]:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise asyncio.CancelledError
        return ()

    sink.fault = fault

    async def body(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [numbered_envelope(1)])
        assert await outbox.drain(60) == 0

    run_outbox(tmp_path / "s", [sink], body)
    assert sink.delivered == [1]


def test_cancellation_that_the_sink_replaces_by_an_error_still_ends_the_queue(
    tmp_path: Path,
) -> None:
    sink = MemorySink()

    async def fault(_: Sequence[Record]) -> Sequence[Refusal]:
        try:
            await asyncio.sleep(50)
        except asyncio.CancelledError:
            raise SinkUnavailable("interrupted") from None
        return ()

    sink.fault = fault

    async def body(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [numbered_envelope(1)])
        assert await outbox.drain(1) == 1

    run_outbox(tmp_path / "s", [sink], body)  # which waits for the end
