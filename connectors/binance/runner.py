"""The sockets that a :class:`Fleet` asks for: all of the websockets' input and output."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from itertools import count

import structlog
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from kronos_connectors._shared.rotating_pool import Close, Open
from kronos_connectors.binance.connection import Connection
from kronos_connectors.binance.frames import IgnoredFrame, Kline, Response, ServerShutdown, Streams
from kronos_connectors.binance.http_status import (
    BLOCKED_STATUSES,
    RATE_LIMIT_STATUSES,
    parse_retry_after,
)
from kronos_connectors.binance.pool import Command, ConnectionPool, InvalidFrame, Send
from kronos_stream.interfaces.source import SourceCallbacks, VenueRefused
from kronos_stream.market.candle import Update
from kronos_stream.market.clock import Clock

_log = structlog.get_logger()

_CLOSE_SECONDS = 1.0
_MAX_FRAME_BYTES = 2**20
_MAX_QUEUED_FRAMES = 256
"""Read ahead, per socket; beyond them the kernel holds the rest."""

_READ_BYTES = 32_768
_FRAMES_PER_YIELD = 64
"""Frames taken in before other tasks have their turn."""

_MAX_RAW_BYTES = 4_096
"""Bytes of a frame that cannot be, for those who look into it."""


class ConnectionRunner:
    """Does what its fleet says, and tells it what happened."""

    def __init__(
        self,
        url: str,
        pool: ConnectionPool,
        callbacks: SourceCallbacks,
        clock: Clock,
        timeout_seconds: float,
    ) -> None:
        self._url, self._pool, self._callbacks, self._clock = url, pool, callbacks, clock
        self._timeout = timeout_seconds
        self._wakeup = asyncio.Event()
        self._sockets: dict[Connection, ClientConnection] = {}
        self._tasks: dict[Connection, asyncio.Task[None]] = {}

    def follow(self, streams: Streams) -> None:
        self._pool.follow(streams)
        self._wakeup.set()

    async def run(self) -> None:
        """Until cancelled. Raises VenueRefused, in an exception group."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._wakeup.clear()
                for command in self._pool.poll(_now()):
                    self._execute(command, tasks)
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._pool.next_wakeup):
                        await self._wakeup.wait()

    def _execute(self, command: Command, tasks: asyncio.TaskGroup) -> None:
        connection = command.member
        if type(command) is Open:
            self._tasks[connection] = tasks.create_task(self._serve(connection))
        elif type(command) is Send:
            # Never waited for here: one that does not read must not delay the others.
            tasks.create_task(self._send(connection, command.message))
        elif type(command) is Close:
            if command.reason:
                self._callbacks.count_event("given up")
                _log.info("connection given up", url=self._url, why=command.reason)
            if connection in self._tasks:
                self._tasks[connection].cancel()

    async def _serve(self, connection: Connection) -> None:
        """One socket from its handshake to its end."""
        try:
            socket = await self._connect(connection)
            if socket is None:
                return
            self._sockets[connection] = socket
            # Of asyncio's own 256 KiB, a thousand frames, parsing holds everybody up for too long.
            socket.transport.max_size = _READ_BYTES  # type: ignore[attr-defined]
            self._callbacks.count_event("connected")
            try:
                self._pool.on_opened(connection, _now())
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
                ping_interval=None,  # the fleet knows a silent server by asking it
                max_size=_MAX_FRAME_BYTES,
                max_queue=_MAX_QUEUED_FRAMES,
                compression=None,  # kline frames are small, and a core is dear
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
            self._report_lost(connection, "not connected", f"HTTP {status}", wait)
        except (OSError, InvalidHandshake, InvalidURI, EOFError) as error:
            self._report_lost(connection, "not connected", str(error) or type(error).__name__)
        return None

    def _report_lost(self, connection: Connection, note: str, why: str, wait: float = 0.0) -> None:
        self._pool.on_lost(connection, _now(), wait)
        self._wakeup.set()
        self._callbacks.count_event(note)
        _log.warning(note, url=self._url, why=why)

    async def _send(self, connection: Connection, message: bytes) -> None:
        socket = self._sockets.get(connection)
        if socket is not None:
            with suppress(ConnectionClosed):  # whoever reads will notice
                await socket.send(message, text=True)

    async def _read(self, connection: Connection, socket: ClientConnection) -> None:
        receive, update, now = self._pool.receive, self._callbacks.update, self._clock.now
        time = asyncio.get_running_loop().time
        try:
            for number in count(1):
                if (
                    number % _FRAMES_PER_YIELD == 0
                ):  # frames that are there already are had without a pause
                    await asyncio.sleep(0)
                frame = await socket.recv(decode=False)
                told = receive(connection, frame, time())
                if isinstance(told, Kline):
                    update(Update(told.series, told.candle, told.closed, now()))
                else:
                    self._handle_frame(told, frame)
        except ConnectionClosed as error:
            self._report_lost(connection, "lost", str(error))

    def _handle_frame(
        self, told: InvalidFrame | Response | ServerShutdown | IgnoredFrame, frame: bytes
    ) -> None:
        """What is no kline."""
        if type(told) is InvalidFrame:
            self._callbacks.reject(told.series, told.reason, frame[:_MAX_RAW_BYTES])
        elif type(told) is IgnoredFrame:
            self._callbacks.count_event("other frame")
        else:
            self._wakeup.set()
            if type(told) is ServerShutdown:
                self._callbacks.count_event("shutdown told")


async def _close(socket: ClientConnection) -> None:
    """Politely, within bounds."""
    with suppress(TimeoutError, OSError, ConnectionClosed):
        async with asyncio.timeout(2 * _CLOSE_SECONDS):
            await socket.close()


def _now() -> float:
    return asyncio.get_running_loop().time()
