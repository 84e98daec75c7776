"""Market of Binance, spot or USD-M futures: its symbols, history and live klines."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from random import Random

import structlog

from kronos_connectors._shared.retry import load_with_retries
from kronos_connectors.binance import checks
from kronos_connectors.binance.options import BinanceOptions
from kronos_connectors.binance.pool import ConnectionPool
from kronos_connectors.binance.rest import FUTURES, SPOT, RestClient
from kronos_connectors.binance.runner import ConnectionRunner
from kronos_connectors.binance.symbols import FUTURES_INTERVALS, SPOT_INTERVALS, Listing
from kronos_stream.interfaces.diagnostics import Check
from kronos_stream.interfaces.source import SourceCallbacks, SourceError
from kronos_stream.market.candle import Candle
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_log = structlog.get_logger()


class Market:
    """One market (spot or futures): symbols with the same hosts and rate limits."""

    def __init__(
        self, options: BinanceOptions, clock: Clock, random: Random, *, futures: bool
    ) -> None:
        self._options, self._clock, self._random, self._futures = options, clock, random, futures
        ws_url = options.futures_ws_url if futures else options.ws_url
        self._ws_url = f"{ws_url.rstrip('/')}/stream"
        self._rest = RestClient(
            FUTURES if futures else SPOT,
            options.futures_rest_url if futures else options.rest_url,
            clock,
            weight_share=options.weight_share,
            timeout_seconds=options.timeout_seconds,
        )
        self._listing: Listing | None = None
        self._listing_lock = asyncio.Lock()
        self._intervals = dict.fromkeys(FUTURES_INTERVALS if futures else SPOT_INTERVALS, True)
        self._series: frozenset[Series] = frozenset()
        self._changed = asyncio.Event()

    async def unsupported(self, series: Collection[Series]) -> dict[Series, str]:
        """See :class:`~kronos_stream.interfaces.source.Source`; reloads the symbols."""
        found = {}
        listing = await self._load_listing(refresh=True)
        for one in sorted(series):
            problem = listing.unsupported_reason(one.symbol)
            name = listing.venue_symbol(one.symbol)
            if name is not None and problem is None and not await self._has_interval(one, name):
                intervals = ", ".join(length for length, has in self._intervals.items() if has)
                kind = "perpetuals" if self._futures else "spot markets"
                problem = f"binance has no bars of {one.timeframe} for {kind}, only {intervals}"
            if problem is not None:
                found[one] = problem
            elif (status := listing.halted_status(one.symbol)) is not None:
                # Not unsupported: trading may resume, and a restart must not fail meanwhile.
                _log.warning("symbol does not trade now", series=one.name, status=status)
        return found

    async def ranked(self) -> Sequence[str]:
        """See :class:`~kronos_stream.interfaces.source.RankingSource`."""
        listing = await self._load_listing(refresh=True)
        ranked = listing.ranked(await self._rest.turnover())
        if not ranked:
            raise SourceError("no symbol trades on binance now")
        return ranked

    def checks(self, series: Collection[Series]) -> Sequence[Check]:
        """Checks of its hosts."""
        kind = "futures" if self._futures else "spot"
        timeout = self._options.timeout_seconds
        return [
            Check(
                f"binance {kind} clock",
                partial(checks.check_clock, self._rest, self._clock, series),
                3 * timeout,
            ),
            Check(
                f"binance {kind} websocket",
                partial(checks.check_websocket, self._ws_url, timeout),
                2 * timeout,
            ),
        ]

    def subscribe(self, series: Collection[Series]) -> None:
        self._series = frozenset(series)
        self._changed.set()

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        name = (await self._load_listing()).venue_symbol(series.symbol)
        if name is None:
            raise SourceError(f"binance does not list {series.symbol}")
        return await self._rest.klines(series, name, start, end)

    async def run(self, callbacks: SourceCallbacks) -> None:
        """Push klines until cancelled. Raises VenueRefused, in an exception group."""
        self._rest.on_event = callbacks.count_event
        options = self._options
        pool = ConnectionPool(
            self._random,
            capacity=options.streams_per_connection,
            stall_seconds=options.stall_seconds,
            lifetime_seconds=options.lifetime_seconds,
        )
        runner = ConnectionRunner(
            self._ws_url, pool, callbacks, self._clock, options.timeout_seconds
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(runner.run())
            while True:
                self._changed.clear()
                runner.follow(await self._streams())
                await self._changed.wait()

    async def close(self) -> None:
        await self._rest.close()

    async def _streams(self) -> Mapping[tuple[str, str], Series]:
        """Subscribed series by the venue's names; retries until the symbols are loaded."""
        streams: dict[tuple[str, str], Series] = {}
        series = self._series
        if not series:
            return streams
        listing = await load_with_retries(
            self._load_listing, self._random, asyncio.sleep, "binance"
        )
        for one in series:
            name = listing.venue_symbol(one.symbol)
            if name is None:
                _log.error("not listed, so not subscribed", series=one.name)
            else:
                streams[name, str(one.timeframe)] = one
        return streams

    async def _load_listing(self, *, refresh: bool = False) -> Listing:
        async with self._listing_lock:
            if self._listing is None or refresh:
                infos = await self._rest.symbols()
                self._listing = Listing(infos, futures=self._futures)
            return self._listing

    async def _has_interval(self, series: Series, name: str) -> bool:
        """Return whether there are such bars; an unknown interval is requested once."""
        interval = str(series.timeframe)
        if interval not in self._intervals:
            self._intervals[interval] = await self._rest.has_interval(name, interval)
        return self._intervals[interval]
