"""Questions to the venues' histories: a few at a time, each with a deadline, each answered once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

from kronos_stream.bars.effects import Fetch
from kronos_stream.interfaces.source import Source, SourceError
from kronos_stream.market.candle import Candle
from kronos_stream.market.series import Series

_CONCURRENCY = 8
"""Requests under way per venue; what its limits allow is the source's to watch."""

_TIMEOUT_SECONDS = 120.0


class BackfillRequest(NamedTuple):
    """What a tape wants to know."""

    series: Series
    fetch: Fetch
    callback: Callable[[Fetch, Sequence[Candle] | SourceError], None]


class Backfill:
    """Asks venues. As a tape asks one thing at a time, the series bound what waits here."""

    def __init__(
        self, sources: Mapping[str, Source], wait_for_room: Callable[[], Awaitable[None]]
    ) -> None:
        """room: returns when more bars can be taken in."""
        self._sources, self._wait_for_room = sources, wait_for_room
        self._queues: dict[str, asyncio.Queue[BackfillRequest]] = {
            venue: asyncio.Queue() for venue in sources
        }
        self.outstanding = 0
        """Questions without a reply."""

    def submit(self, request: BackfillRequest) -> None:
        self.outstanding += 1
        self._queues[request.series.venue].put_nowait(request)

    async def run(self) -> None:
        """Answer until cancelled; whatever a source raises but SourceError ends this."""
        async with asyncio.TaskGroup() as tasks:
            for venue in self._sources:
                for _ in range(_CONCURRENCY):
                    tasks.create_task(self._work(venue))

    async def _work(self, venue: str) -> None:
        source, waiting = self._sources[venue], self._queues[venue]
        while True:
            question = await waiting.get()
            await self._wait_for_room()
            answer = await _fetch(source, question)
            self.outstanding -= 1
            question.callback(question.fetch, answer)


async def _fetch(source: Source, request: BackfillRequest) -> Sequence[Candle] | SourceError:
    start, end = request.fetch
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            return await source.history(request.series, start, end)
    except TimeoutError:
        return SourceError(f"no answer within {_TIMEOUT_SECONDS:g} s")
    except SourceError as error:
        return error
