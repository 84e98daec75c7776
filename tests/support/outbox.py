"""An outbox in virtual time, and a sink that keeps or refuses its records."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from random import Random

from kronos_stream.daemon.delivery.outbox import Outbox
from kronos_stream.daemon.storage.state import State
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.sink import Envelope, Record, Refusal, SinkUnavailable
from kronos_stream.market.clock import LoopClock
from kronos_stream.testing.virtual_time import run_virtual

START = 1_000_000
"""UTC ms at the start of :func:`run_outbox`."""


class MemorySink:
    """A sink that keeps its records; ``down`` and ``fault`` make deliveries fail."""

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
        refusals = await self.fault(records) if self.fault else ()
        refused = {refusal.record.sequence for refusal in refusals}
        for record in records:
            if record.sequence in refused:
                continue
            if record.kind == "deadletter":
                self.dead_letters.append(record.value)
            else:
                self.delivered.append(int(record.value))
        return refusals

    async def close(self) -> None:
        pass


def numbered_envelope(number: int, size: int = 0) -> Envelope:
    """Envelope of a forecast whose value is ``number``, padded to ``size`` bytes."""
    value = (b"%d" % number).ljust(size)
    return Envelope("forecast", f"v:{number % 3}/X:1m", value, (("ce_id", b"x"),))


def run_outbox(
    path: Path,
    sinks: Sequence[MemorySink],
    body: Callable[[Outbox, State], Awaitable[None]],
    *,
    max_age_seconds: float = 1e9,
    seed: int = 0,
) -> Metrics:
    """Run ``body`` beside an outbox with a state file at ``path``; return its metrics."""
    metrics = Metrics()

    async def main() -> None:
        state = await State.open(path)
        outbox = Outbox(
            state, sinks, LoopClock(START), Random(seed), metrics, max_age_seconds=max_age_seconds
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


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"kronos_{name}", labels)
