"""The clients of ccxt that :class:`Shards` asks for: all input of what is watched."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import structlog

from kronos_connectors._shared.rotating_pool import NEVER, Close, Open
from kronos_connectors.ccxt.errors import SeriesRefused
from kronos_connectors.ccxt.exchange import ExchangeClient, ExchangeFactory
from kronos_connectors.ccxt.ohlcv import PushDiff, RowError
from kronos_connectors.ccxt.pool import Client, ClientPool, Command, Unwatch, Watch
from kronos_connectors.ccxt.strict import MAX_RAW_BYTES, Hooks
from kronos_stream.interfaces.source import SourceCallbacks, SourceError, VenueRefused
from kronos_stream.market.candle import Update
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_log = structlog.get_logger()


@dataclass(eq=False, slots=True)
class _OpenClient:
    """A client that is there."""

    instance: ExchangeClient
    tasks: dict[Series, asyncio.Task[None]] = field(default_factory=dict)


class ClientRunner:
    """Does what its shards say, and tells them what happened."""

    def __init__(
        self, factory: ExchangeFactory, pool: ClientPool, callbacks: SourceCallbacks, clock: Clock
    ) -> None:
        self._factory, self._pool = factory, pool
        self._callbacks, self._clock = callbacks, clock
        self._wakeup = asyncio.Event()
        self._clients: dict[Client, _OpenClient] = {}
        self._closing: set[ExchangeClient] = set()

    def follow(self, series: Collection[Series]) -> None:
        self._pool.follow(series)
        self._wakeup.set()

    async def run(self) -> None:
        """Until cancelled; then :meth:`close`. Raises VenueRefused, in an exception group."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._wakeup.clear()
                for command in self._pool.poll(_now()):
                    self._execute(command, tasks)
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._pool.next_wakeup):
                        await self._wakeup.wait()

    async def close(self) -> None:
        """Let go of all that is left; bounded."""
        left = [*self._closing, *(one.instance for one in self._clients.values())]
        self._clients.clear()
        await asyncio.gather(*(instance.close() for instance in left))

    def _execute(self, command: Command, tasks: asyncio.TaskGroup) -> None:
        client = command.member
        if isinstance(command, Open):
            hooks = Hooks(partial(self._on_activity, client), self._on_invalid_frame)
            self._clients[client] = _OpenClient(self._factory.create(hooks))
        elif isinstance(command, Watch):
            watching = tasks.create_task(self._watch(client, command.series, tasks))
            self._clients[client].tasks[command.series] = watching
        elif isinstance(command, Unwatch):
            self._clients[client].tasks.pop(command.series).cancel()
        elif isinstance(command, Close):
            if command.reason:
                self._callbacks.count_event("given up")
                _log.info("client given up", exchange=self._factory.name, why=command.reason)
            self._release(client, tasks)

    async def _watch(self, client: Client, series: Series, tasks: asyncio.TaskGroup) -> None:
        """One series of one client, until the client is of no use or the series refused."""
        instance = self._clients[client].instance
        instance.copy_markets(self._factory.rest)  # they may have been loaded anew
        pushed = PushDiff()
        try:
            while True:
                rows = await instance.watch_ohlcv(series)
                self._handle_rows(client, series, rows, pushed)
                # Whatever ccxt keeps ready, others have their turn.
                await asyncio.sleep(0)
        except VenueRefused:
            raise
        except SeriesRefused as error:
            self._pool.on_refused(client, series, _now(), error.retry_after)
            self._callbacks.count_event("series refused")
            _log.warning("cannot be watched now", series=series.name, why=str(error))
        except SourceError as error:
            if client in self._clients:  # the first of its series to hear of it
                self._pool.on_lost(client, _now(), error.retry_after)
                self._callbacks.count_event("lost")
                _log.warning("client lost", exchange=self._factory.name, why=str(error))
                self._release(client, tasks)
        self._wakeup.set()

    def _handle_rows(
        self, client: Client, series: Series, rows: Sequence[object], pushed: PushDiff
    ) -> None:
        now = self._clock.now()
        try:
            candles = pushed.changed(rows, now)
        except RowError as error:
            self._callbacks.reject(series, str(error), repr(rows).encode()[:MAX_RAW_BYTES])
            return
        if candles and client.live_since == NEVER:
            self._callbacks.count_event("connected")
        for candle in candles:
            self._pool.on_candle(client, series, _now())
            # ccxt does not say whether it is the last word, and so neither do we.
            self._callbacks.update(Update(series, candle, closed=False, received=now))

    def _on_activity(self, client: Client) -> None:
        self._pool.on_activity(client, _now())

    def _on_invalid_frame(self, reason: str, raw: bytes) -> None:
        self._callbacks.reject(None, reason, raw)

    def _release(self, client: Client, tasks: asyncio.TaskGroup) -> None:
        one = self._clients.pop(client)
        for task in one.tasks.values():
            task.cancel()
        self._closing.add(one.instance)
        tasks.create_task(self._close(one.instance))

    async def _close(self, instance: ExchangeClient) -> None:
        await instance.close()
        self._closing.discard(instance)


def _now() -> float:
    return asyncio.get_running_loop().time()
