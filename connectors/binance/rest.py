"""Binance's REST side: history, symbols and its clock, within the request weight it allows."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import aiohttp
import orjson
import structlog

from kronos_connectors.binance.frames import read_candle
from kronos_connectors.binance.options import BinanceOptions
from kronos_stream.market.candle import Candle
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series
from kronos_stream.market.source import SourceError, VenueRefused

_log = structlog.get_logger()

_TIME_WEIGHT, _INFO_WEIGHT = 1, 20
_CLOCK_SECONDS = 600.0
_FINAL = {403, 451}
_PATIENCE = {418, 429}
_UNASKED_SECONDS = 60.0
"""How long to wait after a 429 that does not say how long."""

_BURST_SECONDS = 10.0
"""Weight of so long may be spent at once."""

_NOTABLE_SKEW_MS = 2_000


class Budget:
    """Request weight, refilled evenly; a host that complained is left alone as long as it asks."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self._rate, self._clock = per_minute / 60_000, clock
        self._most = self._rate * _BURST_SECONDS * 1000
        self._left, self._at = self._most, clock.now()
        self._closed_until = 0
        self._turn = asyncio.Lock()

    async def spend(self, weight: int) -> None:
        """Wait until ``weight`` may be spent; first come, first served."""
        async with self._turn:
            while True:
                now = self._clock.now()
                # The clock may have been set back.
                self._left += max(0, now - self._at) * self._rate
                self._left, self._at = min(self._left, max(self._most, weight)), now
                wait = max(self._closed_until - now, (weight - self._left) / self._rate)
                if wait <= 0:
                    self._left -= weight
                    return
                await self._clock.sleep(wait / 1000)

    def pause(self, seconds: float) -> None:
        """The venue asks for quiet."""
        until = self._clock.now() + round(1000 * seconds)
        self._closed_until = max(self._closed_until, until)

    def quiet(self) -> float:
        """Seconds that the venue still wants to be left alone."""
        return max(0.0, (self._closed_until - self._clock.now()) / 1000)


class Rest:
    """One host: spot, or USD-M futures."""

    def __init__(self, options: BinanceOptions, clock: Clock, *, futures: bool) -> None:
        self._base = (options.futures_rest_url if futures else options.rest_url).rstrip("/")
        self._path = "/fapi/v1" if futures else "/api/v3"
        self._futures = futures
        self._rows = 1_500 if futures else 1_000
        self._clock = clock
        self._timeout = aiohttp.ClientTimeout(total=options.timeout_seconds)
        self._budget = Budget(options.weight_per_minute, clock)
        self._session: aiohttp.ClientSession | None = None
        self._skew = 0
        self._skew_until = 0

    async def symbols(self) -> list[Mapping[str, Any]]:
        """What exchangeInfo says of each symbol."""
        info = await self._get("exchangeInfo", {}, _INFO_WEIGHT)
        listed = info.get("symbols") if isinstance(info, dict) else None
        if not isinstance(listed, list):
            raise SourceError(f"{self._base}: exchangeInfo without symbols")
        return [one for one in listed if isinstance(one, dict)]

    async def klines(self, series: Series, symbol: str, start: int, end: int) -> list[Candle]:
        """Closed bars with start <= open < end, ascending."""
        candles: list[Candle] = []
        while start < end:
            now = await self._venue_time()
            end = min(end, now)
            if start >= end:
                break
            step = series.timeframe.milliseconds or 28 * 86_400_000
            rows = min(self._rows, (end - start - 1) // step + 1)
            query = {
                "symbol": symbol,
                "interval": str(series.timeframe),
                "startTime": str(start),
                "endTime": str(end - 1),
                "limit": str(rows),
            }
            page = await self._get("klines", query, self._weight(rows))
            if not isinstance(page, list):
                raise SourceError(f"{self._base}: klines of {symbol} are no list")
            read = [self._candle(row, symbol) for row in page]
            candles += [
                candle
                for candle in read
                if start <= candle.time < end and series.timeframe.after(candle.time) <= now
            ]
            if len(page) < rows:
                break
            start = series.timeframe.after(read[-1].time)
        times = [candle.time for candle in candles]
        if times != sorted(set(times)):
            raise SourceError(f"{self._base}: klines of {symbol} are out of order")
        return candles

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _weight(self, rows: int) -> int:
        if not self._futures:
            return 2
        return 1 if rows < 100 else 2 if rows < 500 else 5 if rows <= 1_000 else 10

    def _candle(self, row: Any, symbol: str) -> Candle:  # noqa: ANN401 - as it came
        if isinstance(row, list) and len(row) >= 8 and type(row[0]) is int:
            candle = read_candle(row[0], [*row[1:6], row[7]])
            if candle is not None and candle.fault() is None:
                return candle
        raise SourceError(f"{self._base}: a kline of {symbol} that cannot be: {row!r:.200}")

    async def _venue_time(self) -> int:
        """UTC ms by the venue's clock."""
        before = self._clock.now()
        if before >= self._skew_until:
            answer = await self._get("time", {}, _TIME_WEIGHT)
            after = self._clock.now()
            theirs = answer.get("serverTime") if isinstance(answer, dict) else None
            if type(theirs) is not int:
                raise SourceError(f"{self._base}: no serverTime")
            self._skew = theirs - (before + after) // 2
            self._skew_until = after + round(1000 * _CLOCK_SECONDS)
            if abs(self._skew) > _NOTABLE_SKEW_MS:
                _log.warning("our clock and the venue's differ", venue="binance", ms=self._skew)
        return self._clock.now() + self._skew

    async def _get(self, what: str, query: Mapping[str, str], weight: int) -> Any:  # noqa: ANN401
        if (quiet := self._budget.quiet()) > 0:
            raise SourceError(f"{self._base} asked us to wait", quiet)
        await self._budget.spend(weight)
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        url = f"{self._base}{self._path}/{what}"
        try:
            async with self._session.get(url, params=query) as answer:
                body = await answer.read()
                status, headers = answer.status, answer.headers
        except (aiohttp.ClientError, OSError) as error:  # a timeout is an OSError, too
            raise SourceError(f"{url}: {error or type(error).__name__}") from error
        if status in _FINAL:
            raise VenueRefused(f"{url}: HTTP {status}, {_text(body)}")
        if status in _PATIENCE:
            wait = _seconds(headers.get("Retry-After"))
            self._budget.pause(wait)
            raise SourceError(f"{url}: HTTP {status}, too many requests", wait)
        if status != 200:
            raise SourceError(f"{url}: HTTP {status}, {_text(body)}")
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise SourceError(f"{url}: not JSON: {error}") from None


def _text(body: bytes) -> str:
    return body[:200].decode(errors="replace")


def _seconds(text: str | None) -> float:
    try:
        return min(max(float(text or ""), 1.0), 3 * 86_400.0)
    except ValueError:
        return _UNASKED_SECONDS
