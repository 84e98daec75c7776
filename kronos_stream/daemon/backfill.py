"""Questions to the venues' histories: a few at a time, each with a deadline, each answered once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

from kronos_stream.market.candle import Candle
from kronos_stream.market.effects import Fetch
from kronos_stream.market.series import Series
from kronos_stream.market.source import Source, SourceError

_AT_ONCE = 8
"""Requests under way per venue; what its limits allow is the source's to watch."""

_DEADLINE_SECONDS = 120.0


class Question(NamedTuple):
    """What a tape wants to know."""

    series: Series
    asked: Fetch
    reply: Callable[[Fetch, Sequence[Candle] | SourceError], None]


class Backfill:
    """Asks venues. As a tape asks one thing at a time, the series bound what waits here."""

    def __init__(self, sources: Mapping[str, Source], room: Callable[[], Awaitable[None]]) -> None:
        """room: returns when more bars can be taken in."""
        self._sources, self._room = sources, room
        self._waiting: dict[str, asyncio.Queue[Question]] = {
            venue: asyncio.Queue() for venue in sources
        }
        self.open = 0
        """Questions without a reply."""

    def ask(self, question: Question) -> None:
        self.open += 1
        self._waiting[question.series.venue].put_nowait(question)

    async def run(self) -> None:
        """Answer until cancelled; whatever a source raises but SourceError ends this."""
        async with asyncio.TaskGroup() as tasks:
            for venue in self._sources:
                for _ in range(_AT_ONCE):
                    tasks.create_task(self._work(venue))

    async def _work(self, venue: str) -> None:
        source, waiting = self._sources[venue], self._waiting[venue]
        while True:
            question = await waiting.get()
            await self._room()
            answer = await _answer(source, question)
            self.open -= 1
            question.reply(question.asked, answer)


async def _answer(source: Source, question: Question) -> Sequence[Candle] | SourceError:
    start, end = question.asked
    try:
        async with asyncio.timeout(_DEADLINE_SECONDS):
            return await source.history(question.series, start, end)
    except TimeoutError:
        return SourceError(f"no answer within {_DEADLINE_SECONDS:g} s")
    except SourceError as error:
        return error
