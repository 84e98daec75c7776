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

from kronos_stream.daemon.board import STANDINGS, Board
from kronos_stream.daemon.logs import without_passwords
from kronos_stream.daemon.metrics import Metrics
from kronos_stream.daemon.openapi import document
from kronos_stream.daemon.settings import variable
from kronos_stream.market.clock import Clock
from kronos_stream.market.utc import rfc3339

_T = TypeVar("_T")

JSON = "application/json"
_TEXT = "text/plain; charset=utf-8"

_OPEN = frozenset({"/healthz", "/readyz"})
_FORECASTS = "/forecasts/"

_SERIES_SECONDS, _METRICS_SECONDS = 1.0, 0.1
"""For so long a page is what it was."""
_TURN = 32
"""Rows made before other tasks have their turn: a millisecond's work."""


class Answer(NamedTuple):
    """What is sent back."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


class Pages:
    """The pages of one daemon."""

    def __init__(
        self,
        metrics: Metrics,
        checks: Callable[[], Mapping[str, str]],
        board: Board,
        clock: Clock,
        *,
        overdue: Callable[[], str] = str,
        token: SecretStr | None = None,
    ) -> None:
        """``checks``: what readiness hangs on → why it is not so, empty if it is.

        overdue: what hangs, in words; empty if nothing does.

        token: what must be shown for all pages but those for probes.
        """
        self.private = True
        """Whether nobody but this machine can ask."""
        self._checks, self._board, self._clock, self._metrics = checks, board, clock, metrics
        metrics.ready.set_function(lambda: not any(checks().values()))
        self._overdue = overdue
        self._token = None if token is None else token.get_secret_value().encode()
        self._document = orjson.dumps(document())
        metrics_page = _Kept(self._render_metrics, _METRICS_SECONDS)
        self._series = _Kept(self._render_series, _SERIES_SECONDS)
        self._pages: dict[str, Callable[[], Awaitable[Answer]]] = {
            "/healthz": self._liveness,
            "/readyz": self._readiness,
            "/metrics": metrics_page.answering(CONTENT_TYPE_LATEST),
            "/series": self._series.answering(JSON),
            "/openapi.json": lambda: _ready(Answer(200, self._document)),
        }

    async def answer(self, method: str, raw_path: str, authorization: str | None) -> Answer:
        """The page of a request. raw_path: as it came, percent-encoded, without the query."""
        path = unquote(raw_path, errors="replace")
        page, series = self._pages.get(path), path.removeprefix(_FORECASTS)
        wants_forecast = series != path
        if path not in _OPEN and not self._admits(authorization):
            return self._refusal()
        if page is None and not wants_forecast:
            there = ", ".join((*self._pages, "/forecasts/SERIES"))
            return problem(404, f"there is no such page; there are {there}")
        if method not in {"GET", "HEAD"}:
            return problem(405, "pages are only read: GET or HEAD", (("Allow", "GET, HEAD"),))
        if (wants_forecast or path == "/series") and self._token is None and not self.private:
            return problem(403, _CLOSED)
        return self._forecast(series) if page is None else await page()

    def _forecast(self, series: str) -> Answer:
        try:
            return Answer(200, self._board.forecast(series))
        except LookupError as error:
            return problem(404, str(error.args[0]))

    def _admits(self, authorization: str | None) -> bool:
        if self._token is None:
            return True
        scheme, _, shown = (authorization or "").partition(" ")
        # Encoded, since only bytes of any kind are compared in constant time.
        given = shown.strip().encode("utf-8", "surrogateescape")
        return compare_digest(given, self._token) and scheme.lower() == "bearer"

    @staticmethod
    def _refusal() -> Answer:
        why = f"this page needs the header Authorization: Bearer, with {variable('http', 'token')}"
        return problem(401, why, (("WWW-Authenticate", 'Bearer realm="kronos-stream"'),))

    async def _liveness(self) -> Answer:
        """To answer at all is half of it; the other half is that nothing hangs."""
        why = self._overdue()
        return Answer(503 if why else 200, f"{why or 'alive'}\n".encode(), _TEXT)

    async def _readiness(self) -> Answer:
        checks = self._checks()
        ready = not any(checks.values())
        told = {name: without_passwords(why) or "ok" for name, why in checks.items()}
        said = {"ready": ready, "checks": told}
        return Answer(200 if ready else 503, orjson.dumps(said))

    async def _render_metrics(self) -> bytes:
        """With what the board knows of series, counted."""
        counts: Counter[tuple[str, str, str]] = Counter()
        for number, standing in enumerate(self._board.standings(), 1):
            counts[standing] += 1
            if number % _TURN == 0:
                await asyncio.sleep(0)
        gauge = self._metrics.series
        gauge.clear()
        for venue, timeframe in {(venue, timeframe) for venue, timeframe, _ in counts}:
            for standing in STANDINGS:  # also those that none is in
                gauge.labels(venue, timeframe, standing).set(counts[venue, timeframe, standing])
        return self._metrics.render()

    async def _render_series(self) -> bytes:
        rows: list[bytes] = []
        for number, row in enumerate(self._board.rows(), 1):
            rows.append(orjson.dumps(row))
            if number % _TURN == 0:
                await asyncio.sleep(0)
        head = orjson.dumps({"at": rfc3339(self._clock.now())})[:-1]
        return head + b',"series":[' + b",".join(rows) + b"]}"


class _Kept:
    """A page's body, made anew when it is asked for and old; all who ask meanwhile share one."""

    def __init__(self, make: Callable[[], Awaitable[bytes]], seconds: float) -> None:
        self._make, self._seconds = make, seconds
        self._body, self._old = b"", 0.0
        self._making = asyncio.Lock()

    def answering(self, content_type: str) -> Callable[[], Awaitable[Answer]]:
        async def answer() -> Answer:
            return Answer(200, await self._fresh(), content_type)

        return answer

    async def _fresh(self) -> bytes:
        uptime = asyncio.get_running_loop().time
        async with self._making:
            if not self._body or uptime() >= self._old:
                self._body = await self._make()
                self._old = uptime() + self._seconds
            return self._body


def problem(status: int, why: str, headers: tuple[tuple[str, str], ...] = ()) -> Answer:
    """An answer that says why there is none."""
    return Answer(status, orjson.dumps({"error": why}), JSON, headers)


async def _ready(value: _T) -> _T:
    return value


_CLOSED = (
    "without a token this page is shown only where 127.0.0.1 is all that is listened on: set "
    f"{variable('http', 'token')}, or listen on 127.0.0.1 ({variable('http', 'host')})"
)
