"""Requests for bars from the venues' REST history: a few at a time, each with a time-out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

import structlog

from kronos_stream.bars.effects import Fetch
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.source import Source, SourceError
from kronos_stream.market.candle import Candle
from kronos_stream.market.series import Series

_log = structlog.get_logger()

_CONCURRENCY = 8
"""Requests in flight per venue; the source itself respects the venue's rate limits."""

_TIMEOUT_SECONDS = 120.0


class BackfillRequest(NamedTuple):
    """Bars that a sequencer asks for, and the callback for the result."""

    series: Series
    fetch: Fetch
    callback: Callable[[Fetch, Sequence[Candle] | SourceError], None]


class Backfill:
    """Queue and workers per venue. A sequencer has one request at a time, so queues are bounded."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        wait_for_room: Callable[[], Awaitable[None]],
        metrics: Metrics,
    ) -> None:
        """wait_for_room: awaited before each request; returns when more bars can be saved."""
        self._sources, self._wait_for_room, self._metrics = sources, wait_for_room, metrics
        self._queues: dict[str, asyncio.Queue[BackfillRequest]] = {
            venue: asyncio.Queue() for venue in sources
        }
        self._failing_venues: set[str] = set()
        self.outstanding = 0
        """Requests without a result."""

    def submit(self, request: BackfillRequest) -> None:
        self.outstanding += 1
        self._queues[request.series.venue].put_nowait(request)

    async def run(self) -> None:
        """Serve requests until cancelled; errors of a source other than SourceError propagate."""
        async with asyncio.TaskGroup() as tasks:
            for venue in self._sources:
                for _ in range(_CONCURRENCY):
                    tasks.create_task(self._serve(venue))

    async def _serve(self, venue: str) -> None:
        source, queue = self._sources[venue], self._queues[venue]
        while True:
            request = await queue.get()
            await self._wait_for_room()
            result = await _fetch(source, request)
            self.outstanding -= 1
            self._report(request.series, result)
            request.callback(request.fetch, result)

    def _report(self, series: Series, result: Sequence[Candle] | SourceError) -> None:
        """Count the result; log when a venue begins to fail and when it recovers."""
        venue, failed = series.venue, isinstance(result, SourceError)
        outcome = "failed" if failed else "filled" if result else "empty"
        self._metrics.backfills.labels(venue, outcome).inc()
        if failed and venue not in self._failing_venues:
            self._failing_venues.add(venue)
            _log.warning("history request failed", series=series.name, why=str(result))
        elif not failed and venue in self._failing_venues:
            self._failing_venues.discard(venue)
            _log.info("history requests succeed again", venue=venue)


async def _fetch(source: Source, request: BackfillRequest) -> Sequence[Candle] | SourceError:
    start, end = request.fetch
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            return await source.history(request.series, start, end)
    except TimeoutError:
        return SourceError(f"no answer within {_TIMEOUT_SECONDS:g} s")
    except SourceError as error:
        return error
