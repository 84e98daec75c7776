"""The outbox: in order per sink, at least once, whatever sinks do; memory within bounds."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from random import Random

import pytest

from kronos_stream.daemon.delivery.outbox import Outbox
from kronos_stream.daemon.delivery.sink_queue import BATCH_BYTES, MEMORY_BYTES
from kronos_stream.daemon.requests import Outcome
from kronos_stream.daemon.storage.state import State, StateError
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.sink import Envelope, Record, Refusal, SinkUnavailable
from kronos_stream.market.clock import LoopClock
from kronos_stream.testing.virtual_time import run_virtual


class MemorySink:
    """A sink that keeps what it is given, and fails as it is told."""

    def __init__(self, name: str = "memory") -> None:
        self.name = name
        self.delivered: list[int] = []
        self.dead_letters: list[bytes] = []
        self.down = False
        self.fault: Callable[[Sequence[Record]], Awaitable[Sequence[Refusal]]] | None = None

    async def start(self) -> None:
        if self.down:
            raise SinkUnavailable("down for the test")

    async def deliver(self, records: Sequence[Record]) -> Sequence[Refusal]:
        if self.down:
            raise SinkUnavailable("down for the test")
        refused = await self.fault(records) if self.fault else ()
        bad = {refusal.record.sequence for refusal in refused}
        for record in records:
            if record.sequence in bad:
                continue
            if record.kind == "deadletter":
                self.dead_letters.append(record.value)
            else:
                self.delivered.append(int(record.value))
        return refused

    async def close(self) -> None:
        pass


def message(number: int, size: int = 0) -> Envelope:
    value = (b"%d" % number).ljust(size)
    return Envelope("forecast", f"v:{number % 3}/X:1m", value, (("ce_id", b"x"),))


def make_dead_letter(_sink: str, refusal: Refusal) -> Envelope:
    return Envelope("deadletter", refusal.record.key, refusal.reason.encode(), ())


def run_outbox(
    path: Path,
    sinks: Sequence[MemorySink],
    body: Callable[[Outbox, State], Awaitable[None]],
    *,
    age: float = 1e9,
    seed: int = 0,
) -> Metrics:
    """Run ``body`` beside an outbox, in virtual time: what was counted."""
    metrics = Metrics()

    async def main() -> None:
        state = await State.open(path)
        outbox = Outbox(
            state,
            sinks,
            LoopClock(1_000_000),
            Random(seed),
            metrics,
            max_age_seconds=age,
            make_dead_letter=make_dead_letter,
        )
        running = asyncio.create_task(outbox.run())
        try:
            await body(outbox, state)
        finally:
            running.cancel()
            await asyncio.wait([running])
            await state.close()
        assert running.cancelled()

    run_virtual(main())
    return metrics


def counted(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"kronos_{name}", labels)


def test_what_is_published_arrives_in_order_and_leaves_the_state(tmp_path: Path) -> None:
    one, two = MemorySink("one"), MemorySink("two")

    async def body(outbox: Outbox, state: State) -> None:
        for i in range(50):
            await outbox.publish([Outcome("s", i, 0, "forecast")], [message(i), message(i + 1000)])
        assert await outbox.drain(10) == 0
        assert await state.backlogs() == {}

    run_outbox(tmp_path / "s", [one, two], body)
    assert one.delivered == two.delivered == [n for i in range(50) for n in (i, i + 1000)]


@pytest.mark.parametrize("seed", range(5))
def test_failures_cost_repetitions_but_never_order_or_a_record(tmp_path: Path, seed: int) -> None:
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
            await outbox.publish([], [message(i)])
            await asyncio.sleep(random.random())
        assert await outbox.drain(100_000) == 0

    run_outbox(tmp_path / "s", [sink], body, seed=seed)
    assert list(dict.fromkeys(sink.delivered)) == list(range(100))


def test_a_dead_sink_holds_up_no_other_and_says_why(tmp_path: Path) -> None:
    dead, alive = MemorySink("dead"), MemorySink("alive")
    dead.down = True

    async def body(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [message(1)])
        await asyncio.sleep(60)
        assert alive.delivered == [1]
        assert outbox.problems() == {"dead": "down for the test", "alive": ""}
        assert await outbox.drain(5) == 1
        dead.down = False
        assert await outbox.drain(60) == 0
        assert outbox.problems() == {"dead": "", "alive": ""}

    run_outbox(tmp_path / "s", [dead, alive], body)
    assert dead.delivered == [1]


def test_a_long_outage_is_kept_on_disk_and_delivered_in_order(tmp_path: Path) -> None:
    sink = MemorySink()
    sink.down = True

    async def body(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [message(0)])
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
            await outbox.publish([], [message(i)])
            await asyncio.sleep(0.05)
        assert await outbox.drain(1_000) == 0

    async def publish(outbox: Outbox, first: int, last: int) -> None:
        for start in range(first, last, 1_000):
            padded = [message(i, 500) for i in range(start, min(start + 1_000, last))]
            await outbox.publish([], padded)

    run_outbox(tmp_path / "s", [sink], body)
    assert sink.delivered == list(range(100_500))


def test_large_records_are_bounded_by_their_bytes(tmp_path: Path) -> None:
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
            await outbox.publish([], [message(i, 1_000_000)])
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert held < MEMORY_BYTES + 2_000_000
        sink.down = False
        assert await outbox.drain(60) == 0

    run_outbox(tmp_path / "s", [sink], body)
    assert sink.delivered == list(range(60))
    assert 1_000_000 < most < BATCH_BYTES + 1_100_000


def test_what_a_dead_daemon_left_goes_out_first(tmp_path: Path) -> None:
    sink = MemorySink()
    sink.down = True

    async def leave(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [message(i) for i in range(1_200)])

    run_outbox(tmp_path / "s", [sink], leave)
    assert sink.delivered == []
    sink.down = False

    async def deliver(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [message(1_200)])
        assert await outbox.drain(60) == 0

    run_outbox(tmp_path / "s", [sink], deliver)
    assert sink.delivered == list(range(1_201))


def test_a_refused_record_becomes_a_dead_letter_and_delays_nobody(tmp_path: Path) -> None:
    sink = MemorySink()

    async def refuse(records: Sequence[Record]) -> Sequence[Refusal]:
        return [Refusal(r, "too big") for r in records if r.value in {b"3", b"too big"}]

    sink.fault = refuse

    async def body(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [message(i) for i in range(6)])
        assert await outbox.drain(60) == 0

    run_outbox(tmp_path / "s", [sink], body)
    assert sink.delivered == [0, 1, 2, 4, 5]
    assert sink.dead_letters == []  # refused in its turn: dropped, or it would go round for ever

    sink.delivered.clear()

    async def refuse_one(records: Sequence[Record]) -> Sequence[Refusal]:
        return [Refusal(record, "too big") for record in records if record.value == b"3"]

    sink.fault = refuse_one
    run_outbox(tmp_path / "s", [sink], body)
    assert sink.dead_letters == [b"too big"]


def test_old_records_are_given_up_in_the_end(tmp_path: Path) -> None:
    sink = MemorySink()
    sink.down = True

    async def body(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [message(i) for i in range(5_000)])
        await asyncio.sleep(90)
        await outbox.publish([], [message(5_000)])
        await asyncio.sleep(20)
        assert await outbox.drain(0) == 1
        sink.down = False
        assert await outbox.drain(60) == 0

    metrics = run_outbox(tmp_path / "s", [sink], body, age=100)
    assert sink.delivered == [5_000]
    assert counted(metrics, "expired_total", sink="memory") == 5_000


def test_what_waits_and_how_long_is_measured(tmp_path: Path) -> None:
    sink = MemorySink()

    async def body(outbox: Outbox, _: State) -> None:
        await asyncio.sleep(1)
        sink.down = True
        await outbox.publish([], [message(1), message(2)], received=[1_000_000, 1_000_000])
        await asyncio.sleep(30)
        measured = outbox._queues["memory"]._metrics
        assert counted(measured, "queue_depth", queue="outbox:memory") == 2
        assert counted(measured, "outbox_age_seconds", sink="memory") == 30
        sink.down = False
        assert await outbox.drain(60) == 0
        assert counted(measured, "queue_depth", queue="outbox:memory") == 0
        assert counted(measured, "outbox_age_seconds", sink="memory") == 0

    measured = run_outbox(tmp_path / "s", [sink], body)
    assert counted(measured, "delivered_total", sink="memory", kind="forecast") == 2
    assert (counted(measured, "sink_failures_total", sink="memory") or 0) > 3
    seconds = counted(measured, "received_to_published_seconds_sum", sink="memory")
    assert seconds is not None
    assert 60 <= seconds <= 80  # two records, 30 to 40 s each


def test_a_sink_that_hangs_is_given_up_and_asked_again(tmp_path: Path) -> None:
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
        await outbox.publish([], [message(1)])
        await asyncio.sleep(0.01)
        assert quick.delivered == [1]
        await asyncio.sleep(61)
        assert outbox.problems() == {"slow": "no answer in 60 s", "quick": ""}
        assert await outbox.drain(180) == 0

    run_outbox(tmp_path / "s", [slow, quick], body)
    assert slow.delivered == [1]


def test_a_sink_that_cancels_itself_is_asked_again(tmp_path: Path) -> None:
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
        await outbox.publish([], [message(1)])
        assert await outbox.drain(60) == 0

    run_outbox(tmp_path / "s", [sink], body)
    assert sink.delivered == [1]


def test_a_stop_ends_a_sink_that_makes_something_else_of_it(tmp_path: Path) -> None:
    sink = MemorySink()

    async def fault(_: Sequence[Record]) -> Sequence[Refusal]:
        try:
            await asyncio.sleep(50)
        except asyncio.CancelledError:
            raise SinkUnavailable("interrupted") from None
        return ()

    sink.fault = fault

    async def body(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [message(1)])
        assert await outbox.drain(1) == 1

    run_outbox(tmp_path / "s", [sink], body)  # which waits for the end


def test_a_publisher_given_up_leaves_no_record_behind(tmp_path: Path) -> None:
    sink = MemorySink()

    async def body(outbox: Outbox, state: State) -> None:
        await outbox.publish([], [message(0)])
        assert await outbox.drain(60) == 0
        for i in range(1, 40):
            publishing = asyncio.create_task(outbox.publish([], [message(i)]))
            for _ in range(i % 4):
                await asyncio.sleep(0)
            publishing.cancel()
            await asyncio.wait([publishing])
        assert await outbox.drain(60) == 0
        assert await state.backlogs() == {}
        await outbox.publish([], [message(40)])
        assert await outbox.drain(60) == 0

    run_outbox(tmp_path / "s", [sink], body)
    assert sink.delivered == sorted(set(sink.delivered))
    assert sink.delivered[0] == 0
    assert sink.delivered[-1] == 40


def test_a_state_that_fails_ends_the_daemon_not_the_record(tmp_path: Path) -> None:
    sink = MemorySink()

    async def main() -> None:
        state = await State.open(tmp_path / "s")
        wall, metrics = LoopClock(1_000_000), Metrics()
        outbox = Outbox(
            state,
            [sink],
            wall,
            Random(0),
            metrics,
            max_age_seconds=1e9,
            make_dead_letter=make_dead_letter,
        )
        running = asyncio.create_task(outbox.run())
        await outbox.publish([], [message(1)])
        assert await outbox.drain(60) == 0
        await state._db.read(lambda: state._db.connection.execute("PRAGMA query_only = 1"))
        with pytest.raises(StateError, match="cannot be written"):
            await outbox.publish([], [message(2)])
        await state._db.read(lambda: state._db.connection.execute("PRAGMA query_only = 0"))

        async def fault(_: Sequence[Record]) -> Sequence[Refusal]:
            await state._db.read(lambda: state._db.connection.execute("PRAGMA query_only = 1"))
            return ()

        sink.fault = fault
        await outbox.publish([], [message(3)])
        with pytest.raises(ExceptionGroup) as failure:
            await running
        assert failure.group_contains(StateError, match="cannot be written")
        await state.close()

    run_virtual(main())
    assert sink.delivered == [1, 3]


def test_records_of_a_sink_set_up_no_more_wait_until_too_old(tmp_path: Path) -> None:
    gone, sink = MemorySink("gone"), MemorySink()
    gone.down = True

    async def leave(outbox: Outbox, state: State) -> None:
        await outbox.publish([], [message(1)])
        await state.record([], [message(0)], sinks=["other"], created=-900_000_000)

    run_outbox(tmp_path / "s", [gone], leave)

    async def without(_: Outbox, state: State) -> None:
        await asyncio.sleep(1)
        assert list(await state.backlogs()) == ["gone"]

    run_outbox(tmp_path / "s", [sink], without, age=86_400)
    assert sink.delivered == []
    gone.down = False

    async def again(outbox: Outbox, _: State) -> None:
        await asyncio.sleep(1)
        assert await outbox.drain(60) == 0

    run_outbox(tmp_path / "s", [gone], again, age=86_400)
    assert gone.delivered == [1]
