"""The clients of ccxt that :class:`Shards` asks for: all input of what is watched."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import structlog

from kronos_connectors.ccxt.errors import SeriesRefused
from kronos_connectors.ccxt.exchange import Exchanges, Instance
from kronos_connectors.ccxt.guard import MOST_KEPT, Hooks
from kronos_connectors.ccxt.rows import Pushed, RowError
from kronos_connectors.ccxt.shards import NEVER, Begin, Client, Command, End, Leave, Shards, Watch
from kronos_stream.market.candle import Update
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series
from kronos_stream.market.source import SourceCallbacks, SourceError, VenueRefused

_log = structlog.get_logger()


@dataclass(eq=False, slots=True)
class _Open:
    """A client that is there."""

    instance: Instance
    tasks: dict[Series, asyncio.Task[None]] = field(default_factory=dict)


class Watching:
    """Does what its shards say, and tells them what happened."""

    def __init__(
        self, exchanges: Exchanges, shards: Shards, intake: SourceCallbacks, clock: Clock
    ) -> None:
        self._exchanges, self._shards = exchanges, shards
        self._intake, self._clock = intake, clock
        self._news = asyncio.Event()
        self._open: dict[Client, _Open] = {}
        self._closing: set[Instance] = set()

    def follow(self, series: Collection[Series]) -> None:
        self._shards.follow(series)
        self._news.set()

    async def run(self) -> None:
        """Until cancelled; then :meth:`close`. Raises VenueRefused, in an exception group."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._news.clear()
                for command in self._shards.act(_now()):
                    self._carry_out(command, tasks)
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._shards.wake):
                        await self._news.wait()

    async def close(self) -> None:
        """Let go of all that is left; bounded."""
        left = [*self._closing, *(one.instance for one in self._open.values())]
        self._open.clear()
        await asyncio.gather(*(instance.close() for instance in left))

    def _carry_out(self, command: Command, tasks: asyncio.TaskGroup) -> None:
        client = command.client
        if isinstance(command, Begin):
            hooks = Hooks(partial(self._heard, client), self._rejected)
            self._open[client] = _Open(self._exchanges.make(hooks))
        elif isinstance(command, Watch):
            watching = tasks.create_task(self._watch(client, command.series, tasks))
            self._open[client].tasks[command.series] = watching
        elif isinstance(command, Leave):
            self._open[client].tasks.pop(command.series).cancel()
        elif isinstance(command, End):
            if command.why:
                self._intake.count_event("given up")
                _log.info("client given up", exchange=self._exchanges.name, why=command.why)
            self._release(client, tasks)

    async def _watch(self, client: Client, series: Series, tasks: asyncio.TaskGroup) -> None:
        """One series of one client, until the client is of no use or the series refused."""
        instance = self._open[client].instance
        instance.share(self._exchanges.main)  # they may have been loaded anew
        pushed = Pushed()
        try:
            while True:
                rows = await instance.watch(series)
                self._take(client, series, rows, pushed)
                # Whatever ccxt keeps ready, others have their turn.
                await asyncio.sleep(0)
        except VenueRefused:
            raise
        except SeriesRefused as error:
            self._shards.refused(client, series, _now(), error.retry_after)
            self._intake.count_event("series refused")
            _log.warning("cannot be watched now", series=series.name, why=str(error))
        except SourceError as error:
            if client in self._open:  # the first of its series to hear of it
                self._shards.failed(client, _now(), error.retry_after)
                self._intake.count_event("lost")
                _log.warning("client lost", exchange=self._exchanges.name, why=str(error))
                self._release(client, tasks)
        self._news.set()

    def _take(self, client: Client, series: Series, rows: Sequence[object], pushed: Pushed) -> None:
        now = self._clock.now()
        try:
            candles = pushed.news(rows, now)
        except RowError as error:
            self._intake.reject(series, str(error), repr(rows).encode()[:MOST_KEPT])
            return
        if candles and client.first == NEVER:
            self._intake.count_event("connected")
        for candle in candles:
            self._shards.pushed(client, series, _now())
            # ccxt does not say whether it is the last word, and so neither do we.
            self._intake.update(Update(series, candle, closed=False, received=now))

    def _heard(self, client: Client) -> None:
        self._shards.heard(client, _now())

    def _rejected(self, reason: str, raw: bytes) -> None:
        self._intake.reject(None, reason, raw)

    def _release(self, client: Client, tasks: asyncio.TaskGroup) -> None:
        one = self._open.pop(client)
        for task in one.tasks.values():
            task.cancel()
        self._closing.add(one.instance)
        tasks.create_task(self._close(one.instance))

    async def _close(self, instance: Instance) -> None:
        await instance.close()
        self._closing.discard(instance)


def _now() -> float:
    return asyncio.get_running_loop().time()
