"""Websockets of a :class:`ConnectionPool`: all of their input and output."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from itertools import count

import structlog
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from kronos_connectors._shared.http_status import (
    BLOCKED_STATUSES,
    RATE_LIMIT_STATUSES,
    parse_retry_after,
)
from kronos_connectors._shared.pool_runner import PoolRunner, loop_time
from kronos_connectors.binance.connection import Connection, Send
from kronos_connectors.binance.frames import IgnoredFrame, Kline, Response, ServerShutdown, Streams
from kronos_connectors.binance.pool import ConnectionPool, InvalidFrame
from kronos_stream.interfaces.source import MAX_REJECTED_BYTES, SourceCallbacks, VenueRefused
from kronos_stream.market.candle import Update
from kronos_stream.market.clock import Clock

_CLOSE_SECONDS = 1.0
_MAX_FRAME_BYTES = 2**20
_MAX_QUEUED_FRAMES = 256
"""Frames read ahead per socket; the kernel holds the rest."""

_READ_BYTES = 32_768
_FRAMES_PER_YIELD = 64
"""Frames handled before other tasks get their turn."""


class ConnectionRunner(PoolRunner[Connection, Send]):
    """Opens websockets, sends requests and passes on what is received."""

    def __init__(
        self,
        url: str,
        pool: ConnectionPool,
        callbacks: SourceCallbacks,
        clock: Clock,
        timeout_seconds: float,
    ) -> None:
        super().__init__(pool, callbacks, structlog.get_logger().bind(url=url))
        self._url, self._pool, self._clock = url, pool, clock
        self._timeout = timeout_seconds
        self._sockets: dict[Connection, ClientConnection] = {}
        self._tasks: dict[Connection, asyncio.Task[None]] = {}

    def follow(self, streams: Streams) -> None:
        self._pool.follow(streams)
        self._wakeup.set()

    def _open(self, member: Connection, tasks: asyncio.TaskGroup) -> None:
        self._tasks[member] = tasks.create_task(self._serve(member))

    def _request(self, request: Send, tasks: asyncio.TaskGroup) -> None:
        # Not awaited here: a peer that does not read must not delay the others.
        tasks.create_task(self._send(request.member, request.message))

    def _close(self, member: Connection, tasks: asyncio.TaskGroup) -> None:  # noqa: ARG002
        if member in self._tasks:
            self._tasks[member].cancel()

    async def _serve(self, connection: Connection) -> None:
        """Serve one socket from its handshake to its end."""
        try:
            socket = await self._connect(connection)
            if socket is None:
                return
            self._sockets[connection] = socket
            # asyncio's default of 256 KiB is a thousand frames: parsing them blocks the loop.
            socket.transport.max_size = _READ_BYTES  # type: ignore[attr-defined]
            self._callbacks.count_event("connected")
            try:
                self._pool.on_opened(connection, loop_time())
                self._wakeup.set()
                await self._read(connection, socket)
            finally:
                del self._sockets[connection]
                await _close(socket)
        finally:
            del self._tasks[connection]

    async def _connect(self, connection: Connection) -> ClientConnection | None:
        try:
            return await connect(
                self._url,
                open_timeout=self._timeout,
                close_timeout=_CLOSE_SECONDS,
                ping_interval=None,  # the connection detects a silent server by a request
                max_size=_MAX_FRAME_BYTES,
                max_queue=_MAX_QUEUED_FRAMES,
                compression=None,  # kline frames are small; inflating them costs CPU time
                proxy=None,
            )
        except InvalidStatus as error:
            status = error.response.status_code
            if status in BLOCKED_STATUSES:
                raise VenueRefused(f"{self._url}: HTTP {status}") from None
            wait = 0.0
            if status in RATE_LIMIT_STATUSES:
                self._callbacks.count_event("rate limited")
                wait = parse_retry_after(error.response.headers.get("Retry-After"))
            self._report_lost(connection, f"HTTP {status}", wait, opened=False)
        except (OSError, InvalidHandshake, InvalidURI, EOFError) as error:
            self._report_lost(connection, str(error) or type(error).__name__, opened=False)
        return None

    async def _send(self, connection: Connection, message: bytes) -> None:
        socket = self._sockets.get(connection)
        if socket is not None:
            with suppress(ConnectionClosed):  # the reading task reports it
                await socket.send(message, text=True)

    async def _read(self, connection: Connection, socket: ClientConnection) -> None:
        receive, update, now = self._pool.receive, self._callbacks.update, self._clock.now
        time = asyncio.get_running_loop().time
        try:
            for number in count(1):
                if number % _FRAMES_PER_YIELD == 0:
                    await asyncio.sleep(0)  # recv does not yield while frames are queued
                frame = await socket.recv(decode=False)
                event = receive(connection, frame, time())
                if isinstance(event, Kline):
                    update(Update(event.series, event.candle, event.closed, now()))
                else:
                    self._handle_other_frame(event, frame)
        except ConnectionClosed as error:
            self._report_lost(connection, str(error))

    def _handle_other_frame(
        self, event: InvalidFrame | Response | ServerShutdown | IgnoredFrame, frame: bytes
    ) -> None:
        if type(event) is InvalidFrame:
            self._callbacks.reject(event.series, event.reason, frame[:MAX_REJECTED_BYTES])
        elif type(event) is IgnoredFrame:
            self._callbacks.count_event("other frame")
        else:
            self._wakeup.set()
            if type(event) is ServerShutdown:
                self._callbacks.count_event("shutdown told")


async def _close(socket: ClientConnection) -> None:
    """Close with a closing handshake, within a bounded time."""
    with suppress(TimeoutError, OSError, ConnectionClosed):
        async with asyncio.timeout(2 * _CLOSE_SECONDS):
            await socket.close()
