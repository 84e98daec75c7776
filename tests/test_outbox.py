"""The outbox: in order per sink, at least once, whatever sinks do; memory within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from random import Random

import pytest

from kronos_stream.daemon.due import Outcome
from kronos_stream.daemon.metrics import Metrics
from kronos_stream.daemon.outbox import Message, Outbox
from kronos_stream.daemon.state import State
from kronos_stream.forecast.sink import Record, Refusal, SinkUnavailable
from kronos_stream.market.clock import LoopClock
from kronos_stream.testing.virtual import run_virtual


class Memory:
    """A sink that keeps what it is given, and fails as it is told."""

    def __init__(self, name: str = "memory") -> None:
        self.name = name
        self.got: list[int] = []
        self.letters: list[bytes] = []
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
                self.letters.append(record.value)
            else:
                self.got.append(int(record.value))
        return refused

    async def close(self) -> None:
        pass


def message(number: int) -> Message:
    return Message("forecast", f"v:{number % 3}/X:1m", b"%d" % number, ())


def bury(refusal: Refusal) -> Message:
    return Message("deadletter", refusal.record.key, refusal.reason.encode(), ())


def trial(
    path: Path,
    sinks: Sequence[Memory],
    body: Callable[[Outbox, State], Awaitable[None]],
    *,
    age: float = 1e9,
    seed: int = 0,
) -> None:
    """Run ``body`` beside an outbox, in virtual time."""

    async def main() -> None:
        state = await State.open(path)
        outbox = Outbox(
            state,
            sinks,
            LoopClock(1_000_000),
            Random(seed),
            Metrics(),
            max_age_seconds=age,
            bury=bury,
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


def test_what_is_published_arrives_in_order_and_leaves_the_state(tmp_path: Path) -> None:
    one, two = Memory("one"), Memory("two")

    async def body(outbox: Outbox, state: State) -> None:
        for i in range(50):
            await outbox.publish([Outcome("s", i, 0, "forecast")], [message(i), message(i + 1000)])
        assert await outbox.drain(10) == 0
        assert await state.undelivered("one", 0, 9) == []

    trial(tmp_path / "s", [one, two], body)
    assert one.got == two.got == [n for i in range(50) for n in (i, i + 1000)]


@pytest.mark.parametrize("seed", range(5))
def test_failures_cost_repetitions_but_never_order_or_a_record(tmp_path: Path, seed: int) -> None:
    sink, random = Memory(), Random(seed)

    async def fault(records: Sequence[Record]) -> Sequence[Refusal]:
        await asyncio.sleep(random.choice([0.0, 0.3, 90.0]))
        if random.random() < 0.4:
            part = records[: random.randrange(len(records) + 1)]
            sink.got += [int(record.value) for record in part]
            raise random.choice([SinkUnavailable("lost"), RuntimeError("a bug"), OSError("gone")])
        return ()

    sink.fault = fault

    async def body(outbox: Outbox, _: State) -> None:
        for i in range(100):
            await outbox.publish([], [message(i)])
            await asyncio.sleep(random.random())
        assert await outbox.drain(100_000) == 0

    trial(tmp_path / "s", [sink], body, seed=seed)
    assert list(dict.fromkeys(sink.got)) == list(range(100))


def test_a_dead_sink_holds_up_no_other_and_says_why(tmp_path: Path) -> None:
    dead, alive = Memory("dead"), Memory("alive")
    dead.down = True

    async def body(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [message(1)])
        await asyncio.sleep(60)
        assert alive.got == [1]
        assert outbox.healthy() == {"dead": "down for the test", "alive": ""}
        assert await outbox.drain(5) == 1
        dead.down = False
        assert await outbox.drain(60) == 0
        assert outbox.healthy() == {"dead": "", "alive": ""}

    trial(tmp_path / "s", [dead, alive], body)
    assert dead.got == [1]


def test_a_long_outage_is_kept_on_disk_and_delivered_in_order(tmp_path: Path) -> None:
    sink = Memory()
    sink.down = True

    async def body(outbox: Outbox, _: State) -> None:
        for first in range(0, 20_000, 100):
            await outbox.publish([], [message(i) for i in range(first, first + 100)])
        lane = outbox._lanes["memory"]
        assert len(lane._fresh) <= 2_000
        assert len(lane._received) <= 2_000
        sink.down = False
        for i in range(20_000, 20_500):
            await outbox.publish([], [message(i)])
            await asyncio.sleep(0.05)
        assert await outbox.drain(1_000) == 0

    trial(tmp_path / "s", [sink], body)
    assert sink.got == list(range(20_500))


def test_what_a_dead_daemon_left_goes_out_first(tmp_path: Path) -> None:
    sink = Memory()
    sink.down = True

    async def leave(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [message(i) for i in range(1_200)])

    trial(tmp_path / "s", [sink], leave)
    assert sink.got == []
    sink.down = False

    async def deliver(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [message(1_200)])
        assert await outbox.drain(60) == 0

    trial(tmp_path / "s", [sink], deliver)
    assert sink.got == list(range(1_201))


def test_a_refused_record_becomes_a_dead_letter_and_delays_nobody(tmp_path: Path) -> None:
    sink = Memory()

    async def refuse(records: Sequence[Record]) -> Sequence[Refusal]:
        return [Refusal(r, "too big") for r in records if r.value in {b"3", b"too big"}]

    sink.fault = refuse

    async def body(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [message(i) for i in range(6)])
        assert await outbox.drain(60) == 0

    trial(tmp_path / "s", [sink], body)
    assert sink.got == [0, 1, 2, 4, 5]
    assert sink.letters == []  # refused in its turn: dropped, or it would go round for ever

    sink.got.clear()

    async def refuse_one(records: Sequence[Record]) -> Sequence[Refusal]:
        return [Refusal(record, "too big") for record in records if record.value == b"3"]

    sink.fault = refuse_one
    trial(tmp_path / "s", [sink], body)
    assert sink.letters == [b"too big"]


def test_old_records_are_given_up_in_the_end(tmp_path: Path) -> None:
    sink = Memory()
    sink.down = True

    async def body(outbox: Outbox, _: State) -> None:
        await outbox.publish([], [message(1)])
        await asyncio.sleep(90)
        await outbox.publish([], [message(2)])
        await asyncio.sleep(20)
        sink.down = False
        assert await outbox.drain(60) == 0

    trial(tmp_path / "s", [sink], body, age=100)
    assert sink.got == [2]
