"""Source of an exchange that ccxt serves: candles watched or polled, history by REST.

ccxt does not report that a bar is closed. So the sequencer requests each bar from history once a
later one arrives or its grace period ends, also where nothing is pushed at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from random import Random

import structlog

from kronos_connectors._shared.retry import load_with_retries
from kronos_connectors._shared.venue_clock import SyncedVenueClock
from kronos_connectors.ccxt.exchange import ExchangeFactory
from kronos_connectors.ccxt.markets import inactive, unsupported_reason
from kronos_connectors.ccxt.ohlcv import Paginator, RowError
from kronos_connectors.ccxt.options import CcxtOptions
from kronos_connectors.ccxt.pool import ClientPool
from kronos_connectors.ccxt.runner import ClientRunner
from kronos_stream.errors import first_error
from kronos_stream.interfaces.diagnostics import Check, Finding
from kronos_stream.interfaces.probes import compare_clocks
from kronos_stream.interfaces.source import SourceCallbacks, SourceError, Traits, VenueRefused
from kronos_stream.market.candle import Candle
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_log = structlog.get_logger()

_GRACE_SECONDS = 2.0
"""Time for the next bar to arrive, where candles are watched."""

_MAX_SETTLE_WAIT_MS = 60_000
"""Longest wait for a bar to close by the exchange's clock."""


class CcxtSource:
    """Candles of one exchange, without amounts: ccxt does not provide them."""

    def __init__(
        self,
        venue: str,
        factory: ExchangeFactory,
        options: CcxtOptions,
        clock: Clock,
        random: Random,
    ) -> None:
        self.venue = venue
        self._settle_ms = round(options.settle_seconds * 1000)
        grace = max(_GRACE_SECONDS if factory.watch_enabled else 0.0, options.settle_seconds)
        self.traits = Traits(grace_seconds=grace, fills_empty=factory.fills_empty)
        self._factory, self._rest = factory, factory.rest
        self._options, self._clock, self._random = options, clock, random
        self._venue_clock = SyncedVenueClock(
            clock,
            self._rest.server_time if self._rest.has("fetchTime") is True else None,
            lambda: factory.cooldown.on_event("clock skewed"),
            venue=venue,
        )
        self._markets_lock = asyncio.Lock()
        self._series: frozenset[Series] = frozenset()
        self._changed = asyncio.Event()
        self._runner: ClientRunner | None = None

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:
        found = await self._unsupported(series)
        # Ask twice: an error page of a proxy may look like an exchange without markets.
        return await self._unsupported(found) if found else {}

    def checks(self, series: Collection[Series]) -> Sequence[Check]:
        if self._rest.has("fetchTime") is not True:
            return []

        async def compare() -> Sequence[Finding]:
            return [await compare_clocks(self._rest.server_time, self._clock, series)]

        return [Check(f"{self.venue} clock", compare, 3 * self._options.timeout_seconds)]

    async def _unsupported(self, series: Collection[Series]) -> dict[Series, str]:
        await self._load_markets()
        found: dict[Series, str] = {}
        for one in sorted(series):
            reason = unsupported_reason(
                one, self._rest.markets, self._rest.timeframes, self._factory.name
            )
            if reason is not None:
                found[one] = reason
            elif inactive(one, self._rest.markets):
                # Not unsupported: trading may resume, and a restart must not fail meanwhile.
                _log.warning("symbol does not trade now", series=one.name)
        return found

    def subscribe(self, series: Collection[Series]) -> None:
        self._series = frozenset(series)
        self._changed.set()

    async def run(self, callbacks: SourceCallbacks) -> None:
        self._factory.cooldown.on_event = callbacks.count_event
        if not self._rest.markets:
            await load_with_retries(self._load_markets, self._random, self._clock.sleep, self.venue)
        if not self._factory.watch_enabled:
            await asyncio.Event().wait()  # the sequencers poll at each close
        options = self._options
        pool = ClientPool(
            self._random,
            capacity=options.shard_size,
            stall_seconds=options.stall_seconds,
            lifetime_seconds=3600 * options.restart_hours,
        )
        self._runner = ClientRunner(self._factory, pool, callbacks, self._clock)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._runner.run())
                while True:
                    self._changed.clear()
                    self._runner.follow(self._series)
                    await self._changed.wait()
        except* VenueRefused as refusals:
            raise first_error(refusals) from None
        finally:
            await self._runner.close()

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        await self._ensure_listed(series)
        settled = await self._wait_until_settled(end)
        max_rows = self._rest.page_size(series.symbol)
        pages = Paginator(series.timeframe, start, min(end, settled), max_rows)
        while (page := pages.next_page()) is not None:
            rows = await self._rest.fetch_ohlcv(series, *page)
            try:
                pages.add(page, rows, settled)
            except RowError as error:
                raise SourceError(f"{self.venue}: {error}") from None
        return pages.candles

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.close()
        await self._rest.close()

    async def _wait_until_settled(self, end: int) -> int:
        """Time by which a bar must have closed to be returned, UTC ms by the exchange's clock.

        Just after the close, a cache may still serve the open bar. But a response without the bar
        would mean that there is none. So wait for all bars up to ``end`` closed by our clock.
        """
        closed = min(end, self._clock.now())
        while (settled := await self._venue_clock.lower_bound() - self._settle_ms) < closed:
            wait = closed - settled
            if wait > _MAX_SETTLE_WAIT_MS:
                raise SourceError(f"{self.venue}: its clock is {wait / 1000:.0f} s behind ours")
            await self._clock.sleep((wait + 1) / 1000)
        return settled

    async def _ensure_listed(self, series: Series) -> None:
        async with self._markets_lock:
            if series.symbol not in self._rest.markets:
                await self._rest.load_markets()
        if series.symbol not in self._rest.markets:
            raise SourceError(f"{self._factory.name} does not list {series.symbol}")

    async def _load_markets(self) -> None:
        async with self._markets_lock:
            await self._rest.load_markets()
