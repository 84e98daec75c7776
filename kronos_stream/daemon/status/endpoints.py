"""HTTP endpoints of the daemon: liveness, readiness, metrics, series and forecasts.

/healthz and /readyz never need a token, so that a supervisor can restart a process that hangs
without knowing a secret. If a token is set, all other endpoints need it; if none is set, /series
and /forecasts are for clients on this machine only.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from hmac import compare_digest
from typing import Any

import orjson
import structlog
from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import SecretStr

from kronos_stream.daemon.config.settings import variable_name
from kronos_stream.daemon.status.openapi import document
from kronos_stream.daemon.status.series import SERIES_STATUSES, SeriesStatusRegistry
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.market.clock import Clock
from kronos_stream.market.utc import rfc3339
from kronos_stream.redaction import redact

_log = structlog.get_logger()

_JSON = "application/json"
_TEXT = "text/plain; charset=utf-8"

_TOKENLESS_PATHS = frozenset({"/healthz", "/readyz"})

_SERIES_TTL_SECONDS, _METRICS_TTL_SECONDS = 1.0, 0.1
"""Time for which rendered bodies are reused."""
_ROWS_PER_SLICE = 32
"""Rows rendered before other tasks run, about a millisecond of work."""


class Endpoints:
    """Endpoints of one daemon, as the aiohttp application :attr:`app`."""

    def __init__(
        self,
        metrics: Metrics,
        checks: Callable[[], Mapping[str, str]],
        series_status: SeriesStatusRegistry,
        clock: Clock,
        *,
        stalled: Callable[[], str] = str,
        token: SecretStr | None = None,
    ) -> None:
        """checks: returns the problem of each part that readiness depends on, empty if none.

        stalled: returns what has made no progress, empty if nothing.
        token: required for all endpoints but those for probes.
        """
        self.loopback_only = True
        """True if only this machine can connect."""
        self._checks, self._series_status, self._clock = checks, series_status, clock
        self._metrics, self._stalled = metrics, stalled
        metrics.ready.set_function(lambda: not any(checks().values()))
        self._token = None if token is None else token.get_secret_value().encode()
        self._document = orjson.dumps(document())
        self._metrics_body = CachedBody(self._render_metrics, _METRICS_TTL_SECONDS)
        self._series_body = CachedBody(self._render_series, _SERIES_TTL_SECONDS)
        self.app = web.Application(middlewares=[_describe_errors, self._authenticate])
        self.app.add_routes(
            [
                web.get("/healthz", self._liveness),
                web.get("/readyz", self._readiness),
                web.get("/metrics", self._get_metrics),
                web.get("/series", self._get_series),
                web.get("/openapi.json", self._get_document),
                web.get("/forecasts/{series:.*}", self._get_forecast),
            ]
        )

    @web.middleware
    async def _authenticate(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in _TOKENLESS_PATHS or self._token is None:
            return await handler(request)
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        # Encoded, because compare_digest accepts strings only if they are ASCII.
        given = token.strip().encode("utf-8", "surrogateescape")
        if not compare_digest(given, self._token) or scheme.lower() != "bearer":
            raise web.HTTPUnauthorized(
                text="this endpoint needs the header Authorization: Bearer, with "
                f"{variable_name('http', 'token')}",
                headers={"WWW-Authenticate": 'Bearer realm="kronos-stream"'},
            )
        return await handler(request)

    async def _liveness(self, _: web.Request) -> web.Response:
        problem = self._stalled()
        status = 503 if problem else 200
        return _response(f"{problem or 'alive'}\n".encode(), _TEXT, status)

    async def _readiness(self, _: web.Request) -> web.Response:
        checks = self._checks()
        ready = not any(checks.values())
        shown = {name: redact(problem) or "ok" for name, problem in checks.items()}
        return _json({"ready": ready, "checks": shown}, 200 if ready else 503)

    async def _get_metrics(self, _: web.Request) -> web.Response:
        return _response(await self._metrics_body.get(), CONTENT_TYPE_LATEST)

    async def _get_document(self, _: web.Request) -> web.Response:
        return _response(self._document, _JSON)

    async def _get_series(self, _: web.Request) -> web.Response:
        self._require_loopback_or_token()
        return _response(await self._series_body.get(), _JSON)

    async def _get_forecast(self, request: web.Request) -> web.Response:
        self._require_loopback_or_token()
        try:
            message = self._series_status.latest_forecast(request.match_info["series"])
        except LookupError as error:
            raise web.HTTPNotFound(text=str(error.args[0])) from None
        return _response(message, _JSON)

    def _require_loopback_or_token(self) -> None:
        if self._token is None and not self.loopback_only:
            raise web.HTTPForbidden(
                text="without a token this endpoint is available only if the daemon listens on "
                f"127.0.0.1 alone: set {variable_name('http', 'token')}, or "
                f"{variable_name('http', 'host')}=127.0.0.1"
            )

    async def _render_metrics(self) -> bytes:
        """Render all metrics, including the number of series by state."""
        counts: Counter[tuple[str, str, str]] = Counter()
        for number, status in enumerate(self._series_status.statuses(), 1):
            counts[status] += 1
            if number % _ROWS_PER_SLICE == 0:
                await asyncio.sleep(0)
        gauge = self._metrics.series
        gauge.clear()
        for venue, timeframe in {(venue, timeframe) for venue, timeframe, _ in counts}:
            for state in SERIES_STATUSES:  # also states without series
                gauge.labels(venue, timeframe, state).set(counts[venue, timeframe, state])
        return self._metrics.render()

    async def _render_series(self) -> bytes:
        rows: list[bytes] = []
        for number, row in enumerate(self._series_status.rows(), 1):
            rows.append(orjson.dumps(row))
            if number % _ROWS_PER_SLICE == 0:
                await asyncio.sleep(0)
        head = orjson.dumps({"at": rfc3339(self._clock.now())})[:-1]
        return head + b',"series":[' + b",".join(rows) + b"]}"


class CachedBody:
    """A response body that is rendered on request, at most once per time to live."""

    def __init__(self, render: Callable[[], Awaitable[bytes]], ttl_seconds: float) -> None:
        self._render, self._ttl = render, ttl_seconds
        self._body, self._expires = b"", 0.0
        self._lock = asyncio.Lock()

    async def get(self) -> bytes:
        """Return the body; concurrent callers share one."""
        loop = asyncio.get_running_loop()
        async with self._lock:
            if not self._body or loop.time() >= self._expires:
                self._body = await self._render()
                self._expires = loop.time() + self._ttl
            return self._body


@web.middleware
async def _describe_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer errors with a JSON object that describes them."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        text, headers = error.text, {k: v for k, v in error.headers.items() if k in _ERROR_HEADERS}
        if error is request.match_info.http_exception:
            text = _ROUTING_ERRORS[error.status]
        return _json({"error": text}, error.status, headers)
    except Exception:  # noqa: BLE001 - must not end the daemon
        _log.exception("request failed", path=request.rel_url.raw_path[:200])
        return _json({"error": "this request failed; see the daemon's log"}, 500)


_ERROR_HEADERS = ("Allow", "WWW-Authenticate")
_ROUTING_ERRORS = {
    404: "no such endpoint; there are /healthz, /readyz, /metrics, /series, /openapi.json and "
    "/forecasts/SERIES",
    405: "all endpoints are read-only: use GET or HEAD",
}


def _json(
    content: Mapping[str, Any], status: int, headers: Mapping[str, str] | None = None
) -> web.Response:
    return _response(orjson.dumps(content), _JSON, status, headers)


def _response(
    body: bytes, content_type: str, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    return web.Response(
        body=body, status=status, headers={"Content-Type": content_type, **(headers or {})}
    )
