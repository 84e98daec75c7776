"""The outbox of several sinks: durable, in order, across restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from kronos_stream.daemon.delivery.outbox import Outbox
from kronos_stream.daemon.requests import Outcome
from kronos_stream.daemon.storage.database import StateError
from kronos_stream.daemon.storage.state import State
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.sink import Record, Refusal
from kronos_stream.market.clock import LoopClock
from kronos_stream.testing.virtual_time import run_virtual
from tests.support.outbox import START, MemorySink, numbered_envelope, run_outbox


def test_records_arrive_in_order_and_leave_the_state_file(tmp_path: Path) -> None:
    one, two = MemorySink("one"), MemorySink("two")

    async def body(outbox: Outbox, state: State) -> None:
        for i in range(50):
            await outbox.publish(
                [Outcome("s", i, 0, "forecast")],
                [numbered_envelope(i), numbered_envelope(i + 1000)],
            )
        assert await outbox.drain(10) == 0
        assert await state.backlogs() == {}

    run_outbox(tmp_path / "s", [one, two], body)
    assert one.delivered == two.delivered == [n for i in range(50) for n in (i, i + 1000)]


def test_unavailable_sink_delays_no_other_and_reports_its_problem(tmp_path: Path) -> None:
    dead, alive = MemorySink("dead"), MemorySink("alive")
    dead.down = True

    async def body(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [numbered_envelope(1)])
        await asyncio.sleep(60)
        assert alive.delivered == [1]
        assert outbox.problems() == {"dead": "down for the test", "alive": ""}
        assert await outbox.drain(5) == 1
        dead.down = False
        assert await outbox.drain(60) == 0
        assert outbox.problems() == {"dead": "", "alive": ""}

    run_outbox(tmp_path / "s", [dead, alive], body)
    assert dead.delivered == [1]


def test_records_of_an_earlier_run_are_delivered_first(tmp_path: Path) -> None:
    sink = MemorySink()
    sink.down = True

    async def leave(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [numbered_envelope(i) for i in range(1_200)])

    run_outbox(tmp_path / "s", [sink], leave)
    assert sink.delivered == []
    sink.down = False

    async def deliver(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [numbered_envelope(1_200)])
        assert await outbox.drain(60) == 0

    run_outbox(tmp_path / "s", [sink], deliver)
    assert sink.delivered == list(range(1_201))


def test_cancelled_publish_leaves_no_undelivered_record(tmp_path: Path) -> None:
    sink = MemorySink()

    async def body(outbox: Outbox, state: State) -> None:
        await outbox.publish([], [numbered_envelope(0)])
        assert await outbox.drain(60) == 0
        for i in range(1, 40):
            publishing = asyncio.create_task(outbox.publish([], [numbered_envelope(i)]))
            for _ in range(i % 4):
                await asyncio.sleep(0)
            publishing.cancel()
            await asyncio.wait([publishing])
        assert await outbox.drain(60) == 0
        assert await state.backlogs() == {}
        await outbox.publish([], [numbered_envelope(40)])
        assert await outbox.drain(60) == 0

    run_outbox(tmp_path / "s", [sink], body)
    assert sink.delivered == sorted(set(sink.delivered))
    assert sink.delivered[0] == 0
    assert sink.delivered[-1] == 40


def test_failing_state_file_ends_the_outbox(tmp_path: Path) -> None:
    sink = MemorySink()

    async def main() -> None:
        state = await State.open(tmp_path / "s")
        wall, metrics = LoopClock(START), Metrics()
        outbox = Outbox(state, [sink], wall, Random(0), metrics, max_age_seconds=1e9)
        running = asyncio.create_task(outbox.run())
        await outbox.publish([], [numbered_envelope(1)])
        assert await outbox.drain(60) == 0
        await state._db.read(lambda: state._db.connection.execute("PRAGMA query_only = 1"))
        with pytest.raises(StateError, match="cannot be written"):
            await outbox.publish([], [numbered_envelope(2)])
        await state._db.read(lambda: state._db.connection.execute("PRAGMA query_only = 0"))

        async def fault(_: Sequence[Record]) -> Sequence[Refusal]:
            await state._db.read(lambda: state._db.connection.execute("PRAGMA query_only = 1"))
            return ()

        sink.fault = fault
        await outbox.publish([], [numbered_envelope(3)])
        with pytest.raises(ExceptionGroup) as failure:
            await running
        assert failure.group_contains(StateError, match="cannot be written")
        await state.close()

    run_virtual(main())
    assert sink.delivered == [1, 3]


def test_records_of_a_removed_sink_wait_until_they_expire(tmp_path: Path) -> None:
    gone, sink = MemorySink("gone"), MemorySink()
    gone.down = True

    async def leave(outbox: Outbox, state: State) -> None:
        await outbox.publish([], [numbered_envelope(1)])
        await state.record([], [numbered_envelope(0)], sinks=["other"], created=-900_000_000)

    run_outbox(tmp_path / "s", [gone], leave)

    async def without(_: Outbox, state: State) -> None:
        await asyncio.sleep(1)
        assert list(await state.backlogs()) == ["gone"]

    run_outbox(tmp_path / "s", [sink], without, max_age_seconds=86_400)
    assert sink.delivered == []
    gone.down = False

    async def again(outbox: Outbox, _: State) -> None:
        await asyncio.sleep(1)
        assert await outbox.drain(60) == 0

    run_outbox(tmp_path / "s", [gone], again, max_age_seconds=86_400)
    assert gone.delivered == [1]
