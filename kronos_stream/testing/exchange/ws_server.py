"""WebSocket handshakes, and the end of connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from random import Random

from aiohttp import web

from kronos_stream.market.clock import Clock
from kronos_stream.testing.exchange.fault_injector import FaultInjector
from kronos_stream.testing.exchange.frames import frame
from kronos_stream.testing.exchange.ws_streams import Connection, Streams

_MAX_CONNECTIONS = 300
_WINDOW_MS = 300_000
_HANG_SECONDS = 30.0
_GOING_AWAY = 1001


class WebSocketServer:
    """Accepts connections, and injects faults into them.

    spot: the venue lists spot markets; otherwise all WebSockets carry futures.
    """

    def __init__(
        self, streams: Streams, clock: Clock, fault_injector: FaultInjector, *, spot: bool
    ) -> None:
        self._streams, self._clock, self._fault_injector, self._spot = (
            streams,
            clock,
            fault_injector,
            spot,
        )
        self._handshake_times: dict[str, list[int]] = {}
        self._connections = 0

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get(prefix + path, self._connect)
            for prefix in ("", "/market", "/futures", "/futures/market")
            for path in ("/ws", "/ws/{names:.*}", "/stream")
        ]

    def abort(self) -> None:
        """Cut all connections."""
        for connection in list(self._streams.connections):
            connection.abort()

    # -- accepting ---------------------------------------------------------------------------

    async def _connect(self, request: web.Request) -> web.StreamResponse:
        number, now = self._connections, self._clock.now()
        self._connections += 1
        if not self._admit(request.remote or "", now):
            return web.Response(status=429, headers={"Retry-After": str(_WINDOW_MS // 1000)})
        failing = self._fault_injector.handshake_fault(number, now)
        if failing is not None:
            self._fault_injector.record("handshake", f"connection {number}", now)
            return await self._fail_handshake(request, failing)
        futures = not self._spot or request.path.startswith(("/market", "/futures"))
        combined = request.path.endswith("/stream")
        names = (
            request.query.get("streams", "") if combined else request.match_info.get("names", "")
        )
        socket = web.WebSocketResponse(autoping=False, compress=False, timeout=2.0)
        await socket.prepare(request)
        if not isinstance(request.transport, asyncio.Transport):  # disconnected already
            return socket
        connection = Connection(
            socket, request.transport, self._streams, futures=futures, combined=combined
        )
        ending = asyncio.create_task(self._end_connection(connection, number))
        try:
            await connection.serve([name for name in names.split("/") if name])
        finally:
            ending.cancel()
            with suppress(asyncio.CancelledError):
                await ending
        return socket

    def _admit(self, address: str, now: int) -> bool:
        recent = [at for at in self._handshake_times.get(address, ()) if at > now - _WINDOW_MS]
        if len(recent) < _MAX_CONNECTIONS:
            recent.append(now)
            self._handshake_times[address] = recent
            return True
        return False

    async def _fail_handshake(self, request: web.Request, random: Random) -> web.StreamResponse:
        """Fail a handshake: reject it, leave it unanswered, or cut it before or after accepting."""
        how = random.randrange(4)
        if how == 0:
            return web.Response(status=random.choice((500, 502, 503)))
        if how == 1:
            await self._clock.sleep(_HANG_SECONDS)
        socket = web.WebSocketResponse()
        if how == 2:
            await socket.prepare(request)
        if request.transport is not None:
            request.transport.abort()
        return socket if how == 2 else web.Response()

    # -- ending ------------------------------------------------------------------------------

    async def _end_connection(self, connection: Connection, number: int) -> None:
        """Close, cut or stall one connection at its time."""
        faults, subject = self._fault_injector.faults, f"connection {number}"
        never = float("inf")
        drop = next(self._fault_injector.fault_times("drop", number), never)
        stall = next(self._fault_injector.fault_times("stall", number), never)
        seconds = min(drop, stall, faults.lifetime_seconds)
        await self._clock.sleep_until(self._clock.now() + round(seconds * 1000))
        kind = "drop" if drop == seconds else "stall" if stall == seconds else "lifetime"
        await self._inject(kind, connection, subject)

    async def _inject(self, kind: str, connection: Connection, subject: str) -> None:
        if self._fault_injector.has_ended(self._clock.now()):
            return
        self._fault_injector.record(kind, subject, self._clock.now())
        if kind == "drop":
            connection.abort()
        elif kind == "stall":
            connection.stall()
            await self._clock.sleep(self._fault_injector.faults.stall_seconds)
            connection.abort()
        else:
            await connection.close(_GOING_AWAY)

    async def run(self) -> None:
        """Inject faults into all connections at once, until cancelled."""
        async with asyncio.TaskGroup() as group:
            injections = {
                "drop": self._drop_all,
                "stall": self._stall_all,
                "shutdown": self._announce_shutdown,
            }
            for planned in self._fault_injector.faults.plan:
                if planned.kind in injections:
                    moments: Iterator[float] = iter((planned.at,))
                    group.create_task(
                        self._inject_repeatedly(moments, injections[planned.kind], group)
                    )
            moments = self._fault_injector.fault_times("shutdown")
            group.create_task(self._inject_repeatedly(moments, self._announce_shutdown, group))

    async def _inject_repeatedly(
        self,
        moments: Iterator[float],
        inject: Callable[[], Coroutine[None, None, None]],
        group: asyncio.TaskGroup,
    ) -> None:
        for seconds in moments:
            await self._clock.sleep_until(self._fault_injector.start + round(seconds * 1000))
            group.create_task(inject())

    async def _drop_all(self) -> None:
        for connection in list(self._streams.connections):
            await self._inject("drop", connection, "all")

    async def _stall_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for connection in list(self._streams.connections):
                group.create_task(self._inject("stall", connection, "all"))

    async def _announce_shutdown(self) -> None:
        """Announce a shutdown to all connections, and then close them."""
        connections = list(self._streams.connections)
        now = self._clock.now()
        if self._fault_injector.has_ended(now):
            return
        self._fault_injector.record("shutdown", f"{len(connections)} connections", now)
        for connection in connections:
            connection.send(frame(b'{"e":"serverShutdown","E":%d}' % now))
        await self._clock.sleep(self._fault_injector.faults.notice_seconds)
        async with asyncio.TaskGroup() as group:
            for connection in connections:
                group.create_task(connection.close(_GOING_AWAY))
