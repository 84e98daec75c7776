"""REST client of Binance: history, symbols and its clock, within the allowed request weight."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
import structlog

from kronos_connectors._shared.http_status import (
    BLOCKED_STATUSES,
    RATE_LIMIT_STATUSES,
    parse_retry_after,
)
from kronos_connectors._shared.venue_clock import SyncedVenueClock
from kronos_connectors.binance.frames import read_candle
from kronos_connectors.binance.rate_limit import WeightLimiter
from kronos_stream.interfaces.source import SourceError, VenueRefused
from kronos_stream.market.candle import Candle
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_log = structlog.get_logger()

_TIME_WEIGHT, _INFO_WEIGHT = 1, 20
_MAX_CONCURRENT_REQUESTS = 8
"""More than one, so that a request that hangs does not block the others."""

_LARGE_RESPONSE_SECONDS = 60.0
"""Added to the time-out of large responses, megabytes, as long as data keeps arriving."""

_INVALID_INTERVAL = -1120


@dataclass(frozen=True, slots=True)
class Host:
    """Differences between the REST hosts of spot and of USD-M futures."""

    prefix: str
    weight_per_minute: int
    page_size: int
    """Rows per request: as many as cost the least weight each."""
    klines_weights: tuple[tuple[int, int], ...]
    """Weight of a request for klines: (most rows, weight), ascending."""
    tickers_weight: int
    """Weight of the 24 h statistics of all symbols."""

    def klines_weight(self, rows: int) -> int:
        return next(weight for most, weight in self.klines_weights if rows <= most)


SPOT = Host("/api/v3", 6_000, 1_000, ((1_000, 2),), 80)
FUTURES = Host("/fapi/v1", 2_400, 499, ((99, 1), (499, 2)), 40)


class ApiError(SourceError):
    """Error response with a code of the venue."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class RestClient:
    """Requests to one host. Every call raises SourceError; VenueRefused if the host blocks us."""

    def __init__(
        self, host: Host, url: str, clock: Clock, *, weight_share: float, timeout_seconds: float
    ) -> None:
        self.on_event: Callable[[str], None] = lambda _: None
        """Called with the events to count."""
        self._host, self._url, self._clock = host, url.rstrip("/") + host.prefix, clock
        self._timeout = timeout_seconds
        self._limiter = WeightLimiter(host.weight_per_minute, weight_share, clock)
        self._request_slots = asyncio.Semaphore(_MAX_CONCURRENT_REQUESTS)
        self._venue_clock = SyncedVenueClock(
            clock, self.server_time, lambda: self.on_event("clock skewed"), url=self._url
        )
        self._session: aiohttp.ClientSession | None = None

    async def symbols(self) -> list[Mapping[str, Any]]:
        """Entries of exchangeInfo, one per symbol."""
        info = await self._get("exchangeInfo", {}, _INFO_WEIGHT, large=True)
        listed = info.get("symbols") if isinstance(info, dict) else None
        if not isinstance(listed, list):
            raise SourceError(f"{self._url}: exchangeInfo without symbols")
        return [one for one in listed if isinstance(one, dict)]

    async def turnover(self) -> dict[str, float]:
        """Turnover of each symbol in the last 24 hours, in quote units."""
        tickers = await self._get("ticker/24hr", {}, self._host.tickers_weight, large=True)
        try:
            return {one["symbol"]: float(one["quoteVolume"]) for one in tickers}
        except (KeyError, TypeError, ValueError):
            raise SourceError(f"{self._url}: invalid 24 h statistics") from None

    async def server_time(self) -> int:
        """Venue's time, UTC ms."""
        answer = await self._get("time", {}, _TIME_WEIGHT)
        server_time = answer.get("serverTime") if isinstance(answer, dict) else None
        if type(server_time) is not int:
            raise SourceError(f"{self._url}: time without serverTime")
        return server_time

    async def has_interval(self, symbol: str, interval: str) -> bool:
        """Return whether there are bars of ``interval``; any listed ``symbol`` will do."""
        query = {"symbol": symbol, "interval": interval, "limit": "1"}
        try:
            await self._get("klines", query, self._host.klines_weight(1))
        except ApiError as error:
            if error.code == _INVALID_INTERVAL:
                return False
            raise
        return True

    async def klines(self, series: Series, symbol: str, start: int, end: int) -> list[Candle]:
        """Closed bars with start <= open < end, ascending."""
        timeframe = series.timeframe
        candles: list[Candle] = []
        while True:
            now = await self._venue_clock.lower_bound()
            end = min(end, now)
            if start >= end:
                break
            rows = min(self._host.page_size, (end - start - 1) // timeframe.min_milliseconds + 1)
            query = {
                "symbol": symbol,
                "interval": str(timeframe),
                "startTime": str(start),
                "endTime": str(end - 1),
                "limit": str(rows),
            }
            page = await self._get("klines", query, self._host.klines_weight(rows))
            parsed = self._parse_klines(page, series, start, end)
            candles += [candle for candle in parsed if timeframe.after(candle.time) <= now]
            if len(parsed) < rows:
                break
            start = timeframe.after(parsed[-1].time)
        return candles

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _parse_klines(self, page: object, series: Series, start: int, end: int) -> list[Candle]:
        """Candles of rows whose format and times are right; prices are not checked here."""
        if not isinstance(page, list):
            raise SourceError(f"{self._url}: klines of {series.symbol} are not a list")
        candles = []
        for row in page:
            candle = self._parse_row(row)
            if candle is None or not start <= candle.time < end:
                raise SourceError(
                    f"{self._url}: klines of {series.symbol} have an invalid row: {row!r:.200}"
                )
            candles.append(candle)
            start = candle.time + 1
        return candles

    @staticmethod
    def _parse_row(row: object) -> Candle | None:
        if not isinstance(row, list) or len(row) < 8 or type(row[0]) is not int:
            return None
        return read_candle(row[0], (*row[1:6], row[7]))

    async def _get(
        self, endpoint: str, query: Mapping[str, str], weight: int, *, large: bool = False
    ) -> Any:  # noqa: ANN401 - JSON is anything
        async with self._request_slots:
            await self._limiter.acquire(weight)
            return await self._request(f"{self._url}/{endpoint}", query, large=large)

    async def _request(self, url: str, query: Mapping[str, str], *, large: bool) -> Any:  # noqa: ANN401
        if self._session is None:
            self._session = aiohttp.ClientSession()
        timeout = aiohttp.ClientTimeout(
            total=_LARGE_RESPONSE_SECONDS + self._timeout if large else self._timeout,
            sock_connect=self._timeout,
            sock_read=self._timeout,
        )
        try:
            async with self._session.get(url, params=query, timeout=timeout) as response:
                body = await response.read()
        except (aiohttp.ClientError, OSError) as error:  # a timeout is an OSError, too
            raise SourceError(f"{url}: {error or type(error).__name__}") from None
        self._record_usage(response.headers.get("X-MBX-USED-WEIGHT-1M"))
        if response.status != 200:
            raise self._error_from(url, response, body)
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise SourceError(f"{url}: not JSON: {error.msg}") from None

    def _record_usage(self, used: str | None) -> None:
        if used is not None and used.isascii() and used.isdecimal() and len(used) < 10:
            self._limiter.record_usage(int(used), self._clock.now() + self._venue_clock.offset)

    def _error_from(self, url: str, response: aiohttp.ClientResponse, body: bytes) -> SourceError:
        status = response.status
        if status in BLOCKED_STATUSES:
            return VenueRefused(f"{url}: HTTP {status}")
        if status in RATE_LIMIT_STATUSES:
            wait = parse_retry_after(response.headers.get("Retry-After"))
            self._limiter.pause(wait)
            self.on_event("rate limited")
            _log.warning("too many requests", url=url, status=status, seconds=wait)
            return SourceError(f"{url}: HTTP {status}", wait)
        try:
            error = orjson.loads(body)
        except orjson.JSONDecodeError:
            error = None
        if isinstance(error, dict) and type(error.get("code")) is int:
            return ApiError(f"{url}: {error.get('msg')!r:.200}", error["code"])
        return SourceError(f"{url}: HTTP {status}")
