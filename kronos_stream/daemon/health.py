"""How the daemon is, over HTTP: /metrics for Prometheus, /readyz and /healthz for who runs it."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import orjson
import structlog
from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from kronos_stream.daemon.metrics import Metrics
from kronos_stream.daemon.settings import SettingsError, variable

_log = structlog.get_logger()

_STOP_SECONDS = 1.0

_LAG_EVERY_SECONDS = 0.25
_LAG_WORTH_SAYING_SECONDS = 1.0


class Health:
    """The endpoints, while the ``async with`` block runs.

    /healthz answers whenever the event loop turns. /readyz answers 200 if every check is empty,
    503 else, and a JSON object that says which is not.
    """

    def __init__(
        self, host: str, port: int, metrics: Metrics, checks: Callable[[], Mapping[str, str]]
    ) -> None:
        """``checks``: what readiness hangs on → why it is not so, empty if it is."""
        self._host, self.port = host, port
        self._metrics, self._checks = metrics, checks
        app = web.Application()
        app.add_routes(
            [
                web.get("/metrics", self._get_metrics),
                web.get("/readyz", self._get_ready),
                web.get("/healthz", self._get_health),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_STOP_SECONDS)

    async def __aenter__(self) -> Self:
        """Listen. Raises SettingsError where that is impossible."""
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self.port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise SettingsError(_explain(error, self._host, self.port)) from None
        self.port = self._runner.addresses[0][1]
        _log.info("metrics and health are served", host=self._host, port=self.port)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._runner.cleanup()

    async def _get_metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    async def _get_ready(self, _: web.Request) -> web.Response:
        checks = self._checks()
        ready = not any(checks.values())
        said = {"ready": ready, "checks": {name: why or "ok" for name, why in checks.items()}}
        return web.Response(
            body=orjson.dumps(said),
            status=200 if ready else 503,
            content_type="application/json",
        )

    async def _get_health(self, _: web.Request) -> web.Response:
        return web.Response(text="alive\n")


async def watch_loop_lag(metrics: Metrics) -> None:
    """Measure how late the event loop wakes, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_EVERY_SECONDS
        await asyncio.sleep(_LAG_EVERY_SECONDS)
        lag = max(0.0, loop.time() - due)
        metrics.loop_lag.observe(lag)
        if lag > _LAG_WORTH_SAYING_SECONDS:
            _log.warning("event loop was blocked", seconds=round(lag, 1))


def _explain(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        why = f"another program listens on {host} there; choose another, or 0 for any that is free"
        return f"{variable('http', 'port')}={port}: {why}"
    if error.errno == errno.EACCES:
        return f"{variable('http', 'port')}={port}: not ours to listen on; choose one above 1023"
    why = "is no address of this machine; 127.0.0.1 is for itself alone, 0.0.0.0 for all"
    return f"{variable('http', 'host')}={host}: {why}"
