"""The outbox: messages are durable before they are delivered, and retried until they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from math import inf, isinf
from random import Random

import structlog

from kronos_stream.daemon.delivery.sink_queue import SinkQueue
from kronos_stream.daemon.requests import Outcome
from kronos_stream.daemon.storage.state import PublishedBar, State
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.sink import Envelope, Sink
from kronos_stream.market.clock import Clock

_log = structlog.get_logger()


class Outbox:
    """Durable queues of all sinks. Call :meth:`run` once, :meth:`publish` at any time.

    Each sink has its own row for each message and its own task, so that a slow or unavailable sink
    does not delay the others.
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
        retry_login: bool = True,
    ) -> None:
        """max_age_seconds: age at which undelivered records are dropped.

        retry_login: whether to retry if a sink refuses the first login.
        """
        self._state, self._wall = state, wall
        self._max_age = round(1000 * max_age_seconds)
        self._last_sequence = 0
        self._lock = asyncio.Lock()
        self._queues = {
            sink.name: SinkQueue(
                sink,
                state,
                wall,
                random,
                metrics,
                max_age=self._max_age,
                lock=self._lock,
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
            except BaseException:  # after a cancellation the records may be in the file
                for queue in self._queues.values():
                    queue.reload()
                raise
            arrivals = (time for time, _ in zip_longest(received, envelopes) for _ in sinks)
            for (sink, record), arrived in zip(records, arrivals, strict=True):
                self._queues[sink].enqueue(record, arrived)
                self._last_sequence = record.sequence

    @property
    def last_sequence(self) -> int:
        """Sequence of the newest record."""
        return self._last_sequence

    @property
    def delivered_sequence(self) -> float:
        """Sequence up to which every sink has taken or refused all records; infinite if all."""
        return min((queue.first_sequence for queue in self._queues.values()), default=inf) - 1

    async def run(self) -> None:
        """Deliver until cancelled, then close the sinks. Raises StateError, SinkLoginRefused."""
        backlogs = await self._state.backlogs()
        async with asyncio.TaskGroup() as tasks:
            for queue in self._queues.values():
                tasks.create_task(queue.run())
            for sink in backlogs.keys() - self._queues.keys():
                await self._warn_orphaned(sink, backlogs[sink].records)

    async def drain(self, seconds: float) -> int:
        """Wait up to ``seconds`` for delivery; return the number of undelivered records."""
        with suppress(TimeoutError):
            async with asyncio.timeout(None if isinf(seconds) else seconds):
                for queue in self._queues.values():
                    await queue.idle.wait()
        return sum(queue.waiting for queue in self._queues.values())

    @property
    def queues(self) -> Mapping[str, SinkQueue]:
        """Queues by sink name."""
        return self._queues

    def problems(self) -> dict[str, str]:
        """Problem by sink name; empty if it delivers."""
        return {name: one.problem or one.delay_problem() for name, one in self._queues.items()}

    async def _warn_orphaned(self, sink: str, records: int) -> None:
        """Warn about records of a sink that is not configured, and drop the expired ones."""
        before = self._wall.now() - self._max_age
        expired = 0
        while (count := (await self._state.expire(sink, before))[0]) > 0:
            expired += count
        _log.warning(
            "records wait for a sink that is not configured",
            sink=sink,
            records=records - expired,
            expired=expired,
        )
