"""The exchange's REST: spot under /api/v3, USD-M futures under /fapi/v1."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import orjson
from aiohttp import web

from kronos_stream.market.clock import Clock
from kronos_stream.testing.exchange.bar_faults import BarFaults
from kronos_stream.testing.exchange.bar_simulator import (
    DAY_MS,
    END_OF_TIME,
    BarHistory,
    BarSimulator,
)
from kronos_stream.testing.exchange.corruption import corrupt_body, error_response
from kronos_stream.testing.exchange.fault_injector import FaultInjector
from kronos_stream.testing.exchange.frames import CLOSE, KlineWriter
from kronos_stream.testing.exchange.instruments import Instrument
from kronos_stream.testing.exchange.limits import ApiError, WeightLimit, banned, rate_limited
from kronos_stream.testing.exchange.symbol_info import symbol_info, ticker_24h

Query = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class MarketRules:
    """Differences between spot and futures."""

    prefix: str
    weight_per_minute: int
    max_rows: int
    perpetual: bool


SPOT = MarketRules("/api/v3", 6000, 1000, perpetual=False)
FUTURES = MarketRules("/fapi/v1", 2400, 1500, perpetual=True)


class RestApi:
    """REST of one of the two markets."""

    def __init__(
        self,
        rules: MarketRules,
        bars: BarSimulator,
        bar_faults: BarFaults,
        clock: Clock,
        fault_injector: FaultInjector,
    ) -> None:
        self._rules, self._bars, self._bar_faults = rules, bars, bar_faults
        self._clock, self._fault_injector = clock, fault_injector
        self._limit = WeightLimit(rules.weight_per_minute, clock)
        self._instruments = {
            instrument.name: (index, instrument)
            for index, instrument in enumerate(bars.instruments)
            if instrument.perpetual == rules.perpetual
        }
        self._writers: dict[tuple[int, str], KlineWriter] = {}

    def routes(self) -> list[web.RouteDef]:
        futures = self._rules.perpetual
        endpoints: dict[str, tuple[Callable[[Query], bytes], Callable[[Query], int]]] = {
            "ping": (lambda _: b"{}", lambda _: 1),
            "time": (self._time, lambda _: 1),
            "exchangeInfo": (self._exchange_info, lambda _: 1 if futures else 20),
            "klines": (self._klines, _futures_klines_weight if futures else lambda _: 2),
            "ticker/24hr": (self._tickers, self._tickers_weight),
        }
        return [
            web.get(f"{self._rules.prefix}/{path}", self._endpoint(answer, weight))
            for path, (answer, weight) in endpoints.items()
        ]

    def _endpoint(
        self, answer: Callable[[Query], bytes], weight: Callable[[Query], int]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            address = request.remote or ""
            try:
                self._raise_if_refusing()
                self._limit.charge(address, weight(request.query))
                response = await self._respond(request, answer)
            except ApiError as error:
                response = error.response()
            used = str(self._limit.used(address))
            response.headers["X-MBX-USED-WEIGHT-1M"] = used
            if not self._rules.perpetual:
                response.headers["X-MBX-USED-WEIGHT"] = used
            return response

        return handle

    # -- faults ----------------------------------------------------------------------------

    def _raise_if_refusing(self) -> None:
        """Raise ApiError during a burst of refusals."""
        now = self._clock.now()
        refused = self._fault_injector.refusal(now)
        if refused is None:
            return
        kind, until = refused
        self._fault_injector.record(kind, self._rules.prefix, now)
        if kind == "banned":
            raise banned(until, now)
        raise rate_limited(self._rules.weight_per_minute, until - now)

    async def _respond(
        self, request: web.Request, answer: Callable[[Query], bytes]
    ) -> web.Response:
        now = self._clock.now()
        kind, random = self._fault_injector.request_fault(request.path_qs, now)
        if kind:
            self._fault_injector.record(kind, request.path_qs, now)
        if kind == "timeout":
            await self._clock.sleep(self._fault_injector.faults.timeout_seconds)
            if request.transport is not None:
                request.transport.abort()
        elif kind == "slow":
            await self._clock.sleep(
                self._fault_injector.faults.slow_seconds * random.uniform(0.5, 1.5)
            )
        elif kind == "error":
            return error_response(random)
        body = answer(request.query)
        if kind == "mangled":
            body = corrupt_body(body, random)
        return web.Response(body=body, content_type="application/json")

    # -- responses -------------------------------------------------------------------------

    def _time(self, _: Query) -> bytes:
        return b'{"serverTime":%d}' % self._clock.now()

    def _exchange_info(self, query: Query) -> bytes:
        chosen = [instrument for _, instrument in self._selected_instruments(query)]
        limit = {
            "rateLimitType": "REQUEST_WEIGHT",
            "interval": "MINUTE",
            "intervalNum": 1,
            "limit": self._rules.weight_per_minute,
        }
        return orjson.dumps(
            {
                "timezone": "UTC",
                "serverTime": self._clock.now(),
                "rateLimits": [limit],
                "exchangeFilters": [],
                "symbols": [symbol_info(instrument) for instrument in chosen],
            }
        )

    def _klines(self, query: Query) -> bytes:
        index, _ = self._single_instrument(query)
        interval = _require(query, "interval")
        history = self._bars.histories.get(interval)
        if history is None:
            raise ApiError(400, -1120, "Invalid interval.")
        start, end = _parse_integer(query, "startTime"), _parse_integer(query, "endTime")
        if start is not None and end is not None and start > end:
            raise ApiError(400, -1023, "Start time is greater than end time.")
        limit = _parse_integer(query, "limit", digits=9)
        limit = 500 if limit is None else limit
        if not limit or (self._rules.perpetual and limit > self._rules.max_rows):
            raise ApiError(400, -1130, "Data sent for parameter 'limit' is not valid.")
        rows = self._rows(history, index, start or 0, END_OF_TIME if end is None else end)
        limit = min(limit, self._rules.max_rows)
        writer = self._writer(index, interval)
        return b"[%s]" % b",".join(
            writer.row(bar, opened, history.timeframe.after(opened))
            for opened, bar in (rows[-limit:] if start is None else rows[:limit])
        )

    def _rows(
        self, history: BarHistory, index: int, start: int, end: int
    ) -> list[tuple[int, list[float]]]:
        """Open times and bars that the venue returns, with the current one at the end."""
        now = self._clock.now()
        self._bars.advance(now)
        opens, bars = history.between(start, end)
        rows = [
            (opened, bar)
            for opened, bar in zip(opens, bars[:, index].tolist(), strict=True)
            if bar[CLOSE] == bar[CLOSE]  # NaN: no bar
            and self._bar_faults.is_visible(history, opened, index, now)
        ]
        if start <= history.opened <= min(end, now):
            bar = self._bars.current_bars(history, now)[index].tolist()
            symbol, interval = self._bars.instruments[index].symbol, str(history.timeframe)
            lost = self._fault_injector.is_lost(symbol, interval, history.opened, history.closes)
            if bar[CLOSE] == bar[CLOSE] and not lost:
                rows.append((history.opened, bar))
        return rows

    def _writer(self, index: int, interval: str) -> KlineWriter:
        if (index, interval) not in self._writers:
            writer = KlineWriter(self._bars.instruments[index], interval)
            self._writers[index, interval] = writer
        return self._writers[index, interval]

    def _tickers(self, query: Query) -> bytes:
        self._bars.advance(self._clock.now())
        history = next(iter(self._bars.histories.values()))
        now = self._clock.now()
        _, bars = history.between(now - DAY_MS, now)
        tickers = [
            ticker_24h(instrument, bars[:, i], now)
            for i, instrument in self._selected_instruments(query)
        ]
        return orjson.dumps(tickers[0] if "symbol" in query else tickers)

    def _tickers_weight(self, query: Query) -> int:
        if "symbol" in query:
            return 1 if self._rules.perpetual else 2
        return 40 if self._rules.perpetual else 80

    # -- parameters ------------------------------------------------------------------------

    def _single_instrument(self, query: Query) -> tuple[int, Instrument]:
        name = _require(query, "symbol")
        if name not in self._instruments:
            raise ApiError(400, -1121, "Invalid symbol.")
        return self._instruments[name]

    def _selected_instruments(self, query: Query) -> list[tuple[int, Instrument]]:
        """Instruments of ``symbol`` or ``symbols``, or all."""
        if "symbol" in query and "symbols" in query:
            raise ApiError(400, -1128, "Combination of optional parameters invalid.")
        if "symbol" in query:
            return [self._single_instrument(query)]
        if "symbols" not in query or self._rules.perpetual:
            return list(self._instruments.values())
        try:
            names = orjson.loads(query["symbols"])
        except orjson.JSONDecodeError:
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ApiError(400, -1100, "Illegal characters found in parameter 'symbols'.")
        if any(name not in self._instruments for name in names):
            raise ApiError(400, -1121, "Invalid symbol.")
        return [self._instruments[name] for name in names]


def _require(query: Query, name: str) -> str:
    if not query.get(name):
        raise ApiError(
            400,
            -1102,
            f"Mandatory parameter '{name}' was not sent, was empty/null, or malformed.",
        )
    return query[name]


def _parse_integer(query: Query, name: str, digits: int = 18) -> int | None:
    text = query.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= digits):
        raise ApiError(
            400,
            -1100,
            f"Illegal characters found in parameter '{name}'; legal range is '^[0-9]{{1,20}}$'.",
        )
    return int(text)


def _futures_klines_weight(query: Query) -> int:
    """Weight by the number of rows requested."""
    limit = query.get("limit", "500")
    rows = int(limit[:9]) if limit.isascii() and limit.isdecimal() else 500
    return 1 if rows < 100 else 2 if rows < 500 else 5 if rows <= 1000 else 10
