"""The outbox: messages are safe before anyone hears of them, and go out until they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from math import inf, isinf
from random import Random

import structlog

from kronos_stream.daemon.delivery.sink_queue import SinkQueue
from kronos_stream.daemon.requests import Outcome
from kronos_stream.daemon.storage.state import PublishedBar, State
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.sink import Envelope, Refusal, Sink
from kronos_stream.market.clock import Clock

_log = structlog.get_logger()


class Outbox:
    """Between what was forecast and the sinks. ``publish`` at any time; ``run`` once.

    Every sink has a row of its own for each message and a task of its own, so that a slow or dead
    one holds up no other.
    """

    def __init__(
        self,
        state: State,
        sinks: Sequence[Sink],
        wall: Clock,
        random: Random,
        metrics: Metrics,
        *,
        max_age_seconds: float,
        make_dead_letter: Callable[[str, Refusal], Envelope],
        retry_login: bool = True,
    ) -> None:
        """max_age_seconds: what waits longer is given up. bury: the dead letter, by sink.

        patient: whether a sink is tried again that does not let us in from the start.
        """
        self._state, self._wall = state, wall
        self._max_age = round(1000 * max_age_seconds)
        self._last_sequence = 0
        order = self._lock = asyncio.Lock()
        self._queues = {
            sink.name: SinkQueue(
                sink,
                state,
                wall,
                random,
                metrics,
                max_age=self._max_age,
                make_dead_letter=make_dead_letter,
                lock=order,
                retry_login=retry_login,
            )
            for sink in sinks
        }

    async def publish(
        self,
        outcomes: Sequence[Outcome],
        envelopes: Sequence[Envelope],
        bars: Sequence[PublishedBar] = (),
        *,
        received: Sequence[int | None] = (),
    ) -> None:
        """Save outcomes and envelopes, all or none; they are durable when this returns.

        bars: closed bars that the envelopes publish, saved with them.
        received: for the latency metric, arrival of the bar behind each envelope, UTC ms by the
            wall clock; None if unknown.
        """
        created = self._wall.now()
        sinks = list(self._queues)
        async with self._lock:
            try:
                records = await self._state.record(
                    outcomes, envelopes, bars, sinks=sinks, created=created
                )
            except BaseException:  # cancelled, they may be in the file nevertheless
                for delivery in self._queues.values():
                    delivery.reload()
                raise
            arrivals = (time for time, _ in zip_longest(received, envelopes) for _ in sinks)
            for (sink, record), arrived in zip(records, arrivals, strict=True):
                self._queues[sink].enqueue(record, arrived)
                self._last_sequence = record.sequence

    @property
    def last_sequence(self) -> int:
        """Sequence of the last record that was put in."""
        return self._last_sequence

    @property
    def delivered_sequence(self) -> float:
        """Every sink has taken or refused all records up to this sequence; infinite if all."""
        return min((one.first_sequence for one in self._queues.values()), default=inf) - 1

    async def run(self) -> None:
        """Deliver until cancelled; the sinks are closed then. Raises StateError, SinkRefused."""
        backlogs = await self._state.backlogs()
        async with asyncio.TaskGroup() as tasks:
            for delivery in self._queues.values():
                tasks.create_task(delivery.run())
            for sink in backlogs.keys() - self._queues.keys():
                await self._warn_orphaned(sink, backlogs[sink].records)

    async def drain(self, seconds: float) -> int:
        """Wait for delivery, no longer than that: how many records are still undelivered."""
        with suppress(TimeoutError):
            async with asyncio.timeout(None if isinf(seconds) else seconds):
                for delivery in self._queues.values():
                    await delivery.idle.wait()
        return sum(delivery.waiting for delivery in self._queues.values())

    @property
    def queues(self) -> Mapping[str, SinkQueue]:
        """By sink, for whoever looks."""
        return self._queues

    def problems(self) -> dict[str, str]:
        """By sink: why it does not deliver; empty if it does."""
        return {name: one.problem or one.delay_problem() for name, one in self._queues.items()}

    async def _warn_orphaned(self, sink: str, records: int) -> None:
        """Records of a sink that is not set up wait for its return, until they are too old."""
        before = self._wall.now() - self._max_age
        given_up = 0
        while (count := (await self._state.expire(sink, before))[0]) > 0:
            given_up += count
        _log.warning(
            "records wait for a sink that is not set up",
            sink=sink,
            records=records - given_up,
            given_up=given_up,
        )
