"""The pages' server: aiohttp, with few connections, each of which must get somewhere.

Whoever sends slowly, reads slowly or sends what is no request takes up one connection of a few,
for a while. When a new client comes and all are taken, the one that has got nowhere for longest
has to go; so nobody can lock out a probe.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from ipaddress import ip_address
from types import TracebackType
from typing import Self

import structlog
from aiohttp import web

from kronos_stream.daemon.config.settings import HttpSettings, SettingsError, variable_name
from kronos_stream.daemon.status.endpoints import Endpoints, Response, error_response

_log = structlog.get_logger()

MAX_CONNECTIONS = 64
IDLE_SECONDS = 20.0
"""A connection is ended when no request of it was answered, and the answer read, for so long."""

_LINE_BYTES = 4_096
"""Of a request line, and of each header."""
_STOP_SECONDS = 1.0

# What aiohttp says of malformed requests is of no use to whoever runs the daemon, and any client
# could fill the log with it. Failures of our own are logged here.
_disabled_logger = logging.getLogger(f"{__name__}.silent")
_disabled_logger.disabled = True


class StatusServer:
    """The pages, served while the ``async with`` block runs."""

    def __init__(self, settings: HttpSettings, pages: Endpoints) -> None:
        self.port = settings.port
        self._host, self._endpoints = settings.host, pages
        self._limiter = _ConnectionLimiter(pages)
        self._runner = web.ServerRunner(self._limiter, shutdown_timeout=_STOP_SECONDS)

    async def __aenter__(self) -> Self:
        """Listen. Raises SettingsError where that is impossible."""
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
        _log.info("metrics and health are served", host=self._host, port=self.port)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._runner.cleanup()
        self._limiter.clear()


class _ConnectionLimiter(web.Server):
    """Lets connections in, and shows those out that get nowhere."""

    def __init__(self, pages: Endpoints) -> None:
        super().__init__(
            self._handle,
            logger=_disabled_logger,
            access_log=None,
            max_line_size=_LINE_BYTES,
            max_field_size=_LINE_BYTES,
            keepalive_timeout=IDLE_SECONDS,
            lingering_time=0,  # bodies are not waited for: no page takes any
            auto_decompress=False,
        )
        self._endpoints = pages
        self._active: dict[web.RequestHandler, tuple[asyncio.Transport, asyncio.TimerHandle]] = {}
        """The one that got somewhere last stands last."""

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self._active) >= MAX_CONNECTIONS:
            self._evict(next(iter(self._active)))
        self._active[handler] = transport, self._timer(handler)

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        if handler in self._active:
            self._active.pop(handler)[1].cancel()
        super().connection_lost(handler, exc)

    def clear(self) -> None:
        """End what is left, unread answers included."""
        for handler in list(self._active):
            self._evict(handler)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        answer = await self._respond(request)
        response = web.Response(
            body=answer.body,
            status=answer.status,
            headers={"Content-Type": answer.content_type, **dict(answer.headers)},
        )
        if request.body_exists:
            response.force_close()
        await response.prepare(request)
        await response.write_eof()  # returns once the client has read, but for the last 64 KiB
        self._touch(request.protocol)
        return response

    async def _respond(self, request: web.BaseRequest) -> Response:
        headers = request.headers
        try:
            return await self._endpoints.handle(
                request.method, request.rel_url.raw_path, headers.get("Authorization")
            )
        except Exception:  # noqa: BLE001 - a page is no reason to end the daemon
            _log.exception("page failed", path=request.rel_url.raw_path[:200])
            return error_response(500, "this page failed; the daemon's log says why")

    def _timer(self, handler: web.RequestHandler) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(IDLE_SECONDS, self._evict, handler)

    def _touch(self, handler: web.RequestHandler) -> None:
        if handler in self._active:
            transport, timer = self._active.pop(handler)
            timer.cancel()
            self._active[handler] = transport, self._timer(handler)

    def _evict(self, handler: web.RequestHandler) -> None:
        transport, timer = self._active.pop(handler)
        timer.cancel()
        transport.abort()  # close() would wait for a client that does not read


def explain_bind_error(error: OSError, host: str, port: int) -> str:
    """Why one cannot listen there, and what to do."""
    if error.errno == errno.EADDRINUSE:
        why = f"another program listens on {host} there; choose another, or 0 for any that is free"
        return f"{variable_name('http', 'port')}={port}: {why}"
    if error.errno == errno.EACCES:
        return (
            f"{variable_name('http', 'port')}={port}: not ours to listen on; choose one above 1023"
        )
    why = "is no address of this machine; 127.0.0.1 is for itself alone, 0.0.0.0 for all"
    return f"{variable_name('http', 'host')}={host}: {why}"
