"""HTTP server of the endpoints, with a limit on connections and on idle clients.

A client that sends or reads slowly, or sends no valid request, occupies one of a few connections
for a limited time. When all are taken and a client connects, the one that has been idle for longest
is evicted, so no client can lock out a probe. aiohttp has no such limits.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from ipaddress import ip_address
from types import TracebackType
from typing import Any, Self

import structlog
from aiohttp import web

from kronos_stream.daemon.config.settings import HttpSettings, SettingsError, variable_name
from kronos_stream.daemon.status.endpoints import Endpoints

_log = structlog.get_logger()

MAX_CONNECTIONS = 64
IDLE_SECONDS = 20.0
"""A connection is closed if, for so long, none of its requests was answered and the answer read."""

_MAX_LINE_BYTES = 4_096
"""Limit for the request line and each header."""
_STOP_SECONDS = 1.0

# aiohttp logs malformed requests, so any client could fill the log. Endpoints log their own errors.
_disabled_logger = logging.getLogger(f"{__name__}.disabled")
_disabled_logger.disabled = True


class StatusServer:
    """Serves the endpoints while the ``async with`` block runs."""

    def __init__(self, settings: HttpSettings, endpoints: Endpoints) -> None:
        self.port = settings.port
        self._host, self._endpoints = settings.host, endpoints
        self._runner = _LimitedRunner(endpoints.app, shutdown_timeout=_STOP_SECONDS)

    async def __aenter__(self) -> Self:
        """Listen. Raises SettingsError if the address cannot be used."""
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self.port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise SettingsError(explain_bind_error(error, self._host, self.port)) from None
        addresses = self._runner.addresses
        self.port = addresses[0][1]
        self._endpoints.loopback_only = all(
            ip_address(address[0]).is_loopback for address in addresses
        )
        _log.info("HTTP server started", host=self._host, port=self.port)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        limiter = self._runner.server
        await self._runner.cleanup()
        if isinstance(limiter, ConnectionLimiter):
            limiter.evict_all()


class ConnectionLimiter(web.Server):
    """Accepts connections and evicts idle ones, see the module."""

    def __init__(self, server: web.Server) -> None:
        """server: handles the requests."""
        super().__init__(
            self._send_response,
            request_factory=server.request_factory,
            logger=_disabled_logger,
            access_log=None,
            max_line_size=_MAX_LINE_BYTES,
            max_field_size=_MAX_LINE_BYTES,
            keepalive_timeout=IDLE_SECONDS,
            lingering_time=0,  # do not wait for request bodies: no endpoint reads them
            auto_decompress=False,
        )
        self._respond = server.request_handler
        self._active: dict[web.RequestHandler, tuple[asyncio.Transport, asyncio.TimerHandle]] = {}
        """In the order of their last answers, oldest first."""

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self._active) >= MAX_CONNECTIONS:
            self._evict(next(iter(self._active)))
        self._active[handler] = transport, self._start_timer(handler)

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        if handler in self._active:
            self._active.pop(handler)[1].cancel()
        super().connection_lost(handler, exc)

    def evict_all(self) -> None:
        """Close all connections, even if answers are not read yet."""
        for handler in list(self._active):
            self._evict(handler)

    async def _send_response(self, request: Any) -> web.StreamResponse:  # noqa: ANN401 - of the factory's type
        response = await self._respond(request)
        if request.body_exists:
            response.force_close()
        await response.prepare(request)
        await response.write_eof()  # returns when the client has read all but the last 64 KiB
        self._touch(request.protocol)
        return response

    def _start_timer(self, handler: web.RequestHandler) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(IDLE_SECONDS, self._evict, handler)

    def _touch(self, handler: web.RequestHandler) -> None:
        if handler in self._active:
            transport, timer = self._active.pop(handler)
            timer.cancel()
            self._active[handler] = transport, self._start_timer(handler)

    def _evict(self, handler: web.RequestHandler) -> None:
        transport, timer = self._active.pop(handler)
        timer.cancel()
        transport.abort()  # close() would wait for a client that does not read


class _LimitedRunner(web.AppRunner):
    async def _make_server(self) -> web.Server:
        return ConnectionLimiter(await super()._make_server())


def explain_bind_error(error: OSError, host: str, port: int) -> str:
    """Name the cause of a failed bind, and the remedy."""
    if error.errno == errno.EADDRINUSE:
        return (
            f"{variable_name('http', 'port')}={port}: another program listens on {host} there; "
            "choose another port, or 0 for any free one"
        )
    if error.errno == errno.EACCES:
        return f"{variable_name('http', 'port')}={port}: no permission; choose a port above 1023"
    return (
        f"{variable_name('http', 'host')}={host}: not an address of this machine; 127.0.0.1 is "
        "for local clients only, 0.0.0.0 for all interfaces"
    )
