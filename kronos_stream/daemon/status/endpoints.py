"""What the daemon tells over HTTP, page by page; no socket is known here.

Probes may ask for /healthz and /readyz without a token, whatever is set: who restarts a process
that hangs should need no secret. All other pages need the token where there is one; where there is
none, those that tell of series are for the loopback alone.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from hmac import compare_digest
from typing import NamedTuple, TypeVar
from urllib.parse import unquote

import orjson
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import SecretStr

from kronos_stream.daemon.config.settings import variable_name
from kronos_stream.daemon.status.openapi import document
from kronos_stream.daemon.status.series import SERIES_STATUSES, SeriesStatusRegistry
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.market.clock import Clock
from kronos_stream.market.utc import rfc3339
from kronos_stream.redaction import redact

_T = TypeVar("_T")

JSON = "application/json"
_TEXT = "text/plain; charset=utf-8"

_TOKENLESS_PATHS = frozenset({"/healthz", "/readyz"})
_FORECASTS_PREFIX = "/forecasts/"

_SERIES_TTL_SECONDS, _METRICS_TTL_SECONDS = 1.0, 0.1
"""For so long a page is what it was."""
_ROWS_PER_SLICE = 32
"""Rows made before other tasks have their turn: a millisecond's work."""


class Response(NamedTuple):
    """What is sent back."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


class Endpoints:
    """The pages of one daemon."""

    def __init__(
        self,
        metrics: Metrics,
        checks: Callable[[], Mapping[str, str]],
        board: SeriesStatusRegistry,
        clock: Clock,
        *,
        stalled: Callable[[], str] = str,
        token: SecretStr | None = None,
    ) -> None:
        """``checks``: what readiness hangs on → why it is not so, empty if it is.

        overdue: what hangs, in words; empty if nothing does.

        token: what must be shown for all pages but those for probes.
        """
        self.loopback_only = True
        """Whether nobody but this machine can ask."""
        self._checks, self._series_status, self._clock, self._metrics = (
            checks,
            board,
            clock,
            metrics,
        )
        metrics.ready.set_function(lambda: not any(checks().values()))
        self._stalled = stalled
        self._token = None if token is None else token.get_secret_value().encode()
        self._document = orjson.dumps(document())
        metrics_page = _CachedBody(self._render_metrics, _METRICS_TTL_SECONDS)
        self._series_body = _CachedBody(self._render_series, _SERIES_TTL_SECONDS)
        self._routes: dict[str, Callable[[], Awaitable[Response]]] = {
            "/healthz": self._liveness,
            "/readyz": self._readiness,
            "/metrics": metrics_page.handler(CONTENT_TYPE_LATEST),
            "/series": self._series_body.handler(JSON),
            "/openapi.json": lambda: _completed(Response(200, self._document)),
        }

    async def handle(self, method: str, raw_path: str, authorization: str | None) -> Response:
        """The page of a request. raw_path: as it came, percent-encoded, without the query."""
        path = unquote(raw_path, errors="replace")
        page, series = self._routes.get(path), path.removeprefix(_FORECASTS_PREFIX)
        wants_forecast = series != path
        if path not in _TOKENLESS_PATHS and not self._authorised(authorization):
            return self._unauthorised()
        if page is None and not wants_forecast:
            there = ", ".join((*self._routes, "/forecasts/SERIES"))
            return error_response(404, f"there is no such page; there are {there}")
        if method not in {"GET", "HEAD"}:
            return error_response(
                405, "pages are only read: GET or HEAD", (("Allow", "GET, HEAD"),)
            )
        if (wants_forecast or path == "/series") and self._token is None and not self.loopback_only:
            return error_response(403, _LOOPBACK_ONLY_ERROR)
        return self._forecast(series) if page is None else await page()

    def _forecast(self, series: str) -> Response:
        try:
            return Response(200, self._series_status.latest_forecast(series))
        except LookupError as error:
            return error_response(404, str(error.args[0]))

    def _authorised(self, authorization: str | None) -> bool:
        if self._token is None:
            return True
        scheme, _, shown = (authorization or "").partition(" ")
        # Encoded, since only bytes of any kind are compared in constant time.
        given = shown.strip().encode("utf-8", "surrogateescape")
        return compare_digest(given, self._token) and scheme.lower() == "bearer"

    @staticmethod
    def _unauthorised() -> Response:
        why = f"this page needs the header Authorization: Bearer, with {variable_name('http', 'token')}"
        return error_response(401, why, (("WWW-Authenticate", 'Bearer realm="kronos-stream"'),))

    async def _liveness(self) -> Response:
        """To answer at all is half of it; the other half is that nothing hangs."""
        why = self._stalled()
        return Response(503 if why else 200, f"{why or 'alive'}\n".encode(), _TEXT)

    async def _readiness(self) -> Response:
        checks = self._checks()
        ready = not any(checks.values())
        told = {name: redact(why) or "ok" for name, why in checks.items()}
        said = {"ready": ready, "checks": told}
        return Response(200 if ready else 503, orjson.dumps(said))

    async def _render_metrics(self) -> bytes:
        """With what the board knows of series, counted."""
        counts: Counter[tuple[str, str, str]] = Counter()
        for number, standing in enumerate(self._series_status.statuses(), 1):
            counts[standing] += 1
            if number % _ROWS_PER_SLICE == 0:
                await asyncio.sleep(0)
        gauge = self._metrics.series
        gauge.clear()
        for venue, timeframe in {(venue, timeframe) for venue, timeframe, _ in counts}:
            for standing in SERIES_STATUSES:  # also those that none is in
                gauge.labels(venue, timeframe, standing).set(counts[venue, timeframe, standing])
        return self._metrics.render()

    async def _render_series(self) -> bytes:
        rows: list[bytes] = []
        for number, row in enumerate(self._series_status.rows(), 1):
            rows.append(orjson.dumps(row))
            if number % _ROWS_PER_SLICE == 0:
                await asyncio.sleep(0)
        head = orjson.dumps({"at": rfc3339(self._clock.now())})[:-1]
        return head + b',"series":[' + b",".join(rows) + b"]}"


class _CachedBody:
    """A page's body, made anew when it is asked for and old; all who ask meanwhile share one."""

    def __init__(self, make: Callable[[], Awaitable[bytes]], seconds: float) -> None:
        self._render, self._ttl = make, seconds
        self._body, self._expires = b"", 0.0
        self._lock = asyncio.Lock()

    def handler(self, content_type: str) -> Callable[[], Awaitable[Response]]:
        async def answer() -> Response:
            return Response(200, await self._get(), content_type)

        return answer

    async def _get(self) -> bytes:
        uptime = asyncio.get_running_loop().time
        async with self._lock:
            if not self._body or uptime() >= self._expires:
                self._body = await self._render()
                self._expires = uptime() + self._ttl
            return self._body


def error_response(status: int, why: str, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    """An answer that says why there is none."""
    return Response(status, orjson.dumps({"error": why}), JSON, headers)


async def _completed(value: _T) -> _T:
    return value


_LOOPBACK_ONLY_ERROR = (
    "without a token this page is shown only where 127.0.0.1 is all that is listened on: set "
    f"{variable_name('http', 'token')}, or listen on 127.0.0.1 ({variable_name('http', 'host')})"
)
