"""Clients of a :class:`ClientPool`: all candles that they watch."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

import structlog

from kronos_connectors._shared.pool_runner import PoolRunner, loop_time
from kronos_connectors._shared.rotating_pool import NEVER
from kronos_connectors.ccxt.client import Client, Unwatch, Watch
from kronos_connectors.ccxt.errors import SeriesRefused
from kronos_connectors.ccxt.exchange import ExchangeClient, ExchangeFactory
from kronos_connectors.ccxt.ohlcv import PushDiff, RowError
from kronos_connectors.ccxt.pool import ClientPool
from kronos_connectors.ccxt.strict import Hooks
from kronos_stream.interfaces.source import (
    MAX_REJECTED_BYTES,
    SourceCallbacks,
    SourceError,
    VenueRefused,
)
from kronos_stream.market.candle import Update
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series


@dataclass(eq=False, slots=True)
class _OpenClient:
    """A client's instance of ccxt, and a task for each series that it watches."""

    instance: ExchangeClient
    tasks: dict[Series, asyncio.Task[None]] = field(default_factory=dict)


class ClientRunner(PoolRunner[Client, Watch | Unwatch]):
    """Creates and closes clients, and passes on the candles that they watch."""

    def __init__(
        self, factory: ExchangeFactory, pool: ClientPool, callbacks: SourceCallbacks, clock: Clock
    ) -> None:
        super().__init__(pool, callbacks, structlog.get_logger().bind(exchange=factory.name))
        self._factory, self._pool, self._clock = factory, pool, clock
        self._clients: dict[Client, _OpenClient] = {}
        self._closing: set[ExchangeClient] = set()

    def follow(self, series: Collection[Series]) -> None:
        self._pool.follow(series)
        self._wakeup.set()

    async def close(self) -> None:
        """Close all clients that are left, within a bounded time; call it after :meth:`run`."""
        left = [*self._closing, *(client.instance for client in self._clients.values())]
        self._clients.clear()
        await asyncio.gather(*(instance.close() for instance in left))

    def _open(self, member: Client, tasks: asyncio.TaskGroup) -> None:  # noqa: ARG002
        hooks = Hooks(partial(self._on_activity, member), self._on_invalid_frame)
        self._clients[member] = _OpenClient(self._factory.create(hooks))

    def _request(self, request: Watch | Unwatch, tasks: asyncio.TaskGroup) -> None:
        client, series = request
        if isinstance(request, Watch):
            watching = tasks.create_task(self._watch(client, series, tasks))
            self._clients[client].tasks[series] = watching
        else:
            self._clients[client].tasks.pop(series).cancel()

    def _close(self, member: Client, tasks: asyncio.TaskGroup) -> None:
        client = self._clients.pop(member)
        for task in client.tasks.values():
            task.cancel()
        self._closing.add(client.instance)
        tasks.create_task(self._close_instance(client.instance))

    async def _close_instance(self, instance: ExchangeClient) -> None:
        await instance.close()
        self._closing.discard(instance)

    async def _watch(self, client: Client, series: Series, tasks: asyncio.TaskGroup) -> None:
        """Watch one series until its client fails or the series is refused."""
        instance = self._clients[client].instance
        instance.copy_markets(self._factory.rest)  # they may have been reloaded
        pushed = PushDiff()
        try:
            while True:
                rows = await instance.watch_ohlcv(series)
                self._handle_rows(client, series, rows, pushed)
                await asyncio.sleep(0)  # watch_ohlcv does not yield while ccxt has rows queued
        except VenueRefused:
            raise
        except SeriesRefused as error:
            self._pool.on_refused(client, series, loop_time(), error.retry_after)
            self._callbacks.count_event("series refused")
            self._log.warning("cannot be watched now", series=series.name, why=str(error))
        except SourceError as error:
            if client in self._clients:  # the first of its series to fail
                self._report_lost(client, str(error), error.retry_after)
                self._close(client, tasks)
        self._wakeup.set()

    def _handle_rows(
        self, client: Client, series: Series, rows: Sequence[object], pushed: PushDiff
    ) -> None:
        now = self._clock.now()
        try:
            candles = pushed.changed(rows, now)
        except RowError as error:
            self._callbacks.reject(series, str(error), repr(rows).encode()[:MAX_REJECTED_BYTES])
            return
        if candles and client.live_since == NEVER:
            self._callbacks.count_event("connected")
        for candle in candles:
            self._pool.on_candle(client, series, loop_time())
            # ccxt does not report whether a bar is closed.
            self._callbacks.update(Update(series, candle, closed=False, received=now))

    def _on_activity(self, client: Client) -> None:
        self._pool.on_activity(client, loop_time())

    def _on_invalid_frame(self, reason: str, raw: bytes) -> None:
        self._callbacks.reject(None, reason, raw)
