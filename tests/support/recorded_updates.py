"""Recorder of a source's callbacks, and a server for its requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from kronos_stream.interfaces.source import (
    SourceCallbacks,
)
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.series import Series


@dataclass
class RecordedUpdates:
    """Everything that a source reported."""

    updates: list[Update] = field(default_factory=list)
    rejected: list[tuple[Series | None, str, bytes]] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)

    def callbacks(self) -> SourceCallbacks:
        return SourceCallbacks(
            self.updates.append,
            lambda *what: self.rejected.append(what),
            lambda event: self.events.update([event]),
        )

    def closed(self, series: Series) -> dict[int, Candle]:
        """Closed bars of a series by open time."""
        return {u.candle.time: u.candle for u in self.updates if u.series == series and u.closed}


@asynccontextmanager
async def served(
    reply: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> AsyncIterator[str]:
    """HTTP server that answers every request by ``reply``; yields its URL."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", reply)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
