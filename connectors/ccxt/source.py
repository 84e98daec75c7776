"""An exchange of ccxt's as a source: watched or polled, with its history by REST.

ccxt never says that a bar is closed. So no push is more than a sign of life: the tape asks the
history for a bar once a later one shows up or its grace is over, and so it does where nothing is
pushed at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from random import Random

import structlog

from kronos_connectors._shared.venue_clock import VenueClock
from kronos_connectors.ccxt.exchange import ExchangeFactory
from kronos_connectors.ccxt.markets import inactive, unsupported_reason
from kronos_connectors.ccxt.ohlcv import Paginator, RowError
from kronos_connectors.ccxt.options import CcxtOptions
from kronos_connectors.ccxt.pool import ClientPool
from kronos_connectors.ccxt.runner import ClientRunner
from kronos_stream.interfaces.diagnostics import Check, Finding
from kronos_stream.interfaces.probes import compare_clocks
from kronos_stream.interfaces.source import SourceCallbacks, SourceError, Traits, VenueRefused
from kronos_stream.market.candle import Candle
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_log = structlog.get_logger()

_GRACE_SECONDS = 2.0
"""For the next bar to show up, where candles are watched."""

_LONGEST_WAIT_MS = 60_000
"""How long a question waits for a bar to be closed at the exchange, too."""

_NOTABLE_OFFSET_MS = 2_000
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0


class CcxtSource:
    """Candles of one exchange. Amounts are left out: ccxt does not tell them."""

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
        self._venue_clock = VenueClock()
        self._clock_lock, self._markets_lock = asyncio.Lock(), asyncio.Lock()
        self._series: frozenset[Series] = frozenset()
        self._changed = asyncio.Event()
        self._runner: ClientRunner | None = None

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:
        found = await self._unsupported(series)
        # What a proxy serves may read as an exchange without markets: one word is not enough.
        return await self._unsupported(found) if found else {}

    def checks(self, series: Collection[Series]) -> Sequence[Check]:
        if self._rest.has("fetchTime") is not True:
            return []

        async def look() -> Sequence[Finding]:
            return [await compare_clocks(self._rest.server_time, self._clock, series)]

        return [Check(f"{self.venue} clock", look, 3 * self._options.timeout_seconds)]

    async def _unsupported(self, series: Collection[Series]) -> dict[Series, str]:
        async with self._markets_lock:
            await self._rest.load_markets()
        found: dict[Series, str] = {}
        for one in sorted(series):
            why = unsupported_reason(
                one, self._rest.markets, self._rest.timeframes, self._factory.name
            )
            if why is not None:
                found[one] = why
            elif inactive(one, self._rest.markets):
                # It may trade again; a restart must not fail for it.
                _log.warning("symbol does not trade now", series=one.name)
        return found

    def subscribe(self, series: Collection[Series]) -> None:
        self._series = frozenset(series)
        self._changed.set()

    async def run(self, callbacks: SourceCallbacks) -> None:
        self._factory.cooldown.on_event = callbacks.count_event
        await self._load_with_retries()
        if not self._factory.watch_enabled:
            await asyncio.Event().wait()  # the tapes ask at each close
        options = self._options
        shards = ClientPool(
            self._random,
            capacity=options.shard_size,
            stall_seconds=options.stall_seconds,
            lifetime_seconds=3600 * options.restart_hours,
        )
        self._runner = ClientRunner(self._factory, shards, callbacks, self._clock)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._runner.run())
                while True:
                    self._changed.clear()
                    self._runner.follow(self._series)
                    await self._changed.wait()
        except* VenueRefused as refusals:
            raise _first_refusal(refusals) from None
        finally:
            await self._runner.close()

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        await self._ensure_listed(series)
        settled = await self._wait_until_settled(end)
        most = self._rest.page_size(series.symbol)
        pages = Paginator(series.timeframe, start, min(end, settled), most)
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
        """The moment by which a bar must have closed to be taken, UTC ms by the exchange's clock.

        What a cache serves just after the close may be the bar as it was just before. An answer
        without the bar, though, would say that there is none. So what has closed by our clock, up
        to ``end``, is waited for.
        """
        closed = min(end, self._clock.now())
        while (settled := await self._venue_time() - self._settle_ms) < closed:
            wait = closed - settled
            if wait > _LONGEST_WAIT_MS:
                raise SourceError(f"{self.venue}: its clock is {wait / 1000:.0f} s behind ours")
            await self._clock.sleep((wait + 1) / 1000)
        return settled

    async def _ensure_listed(self, series: Series) -> None:
        async with self._markets_lock:
            if series.symbol not in self._rest.markets:
                await self._rest.load_markets()
        if series.symbol not in self._rest.markets:
            raise SourceError(f"{self._factory.name} does not list {series.symbol}")

    async def _load_with_retries(self) -> None:
        pause = _SHORTEST_PAUSE_SECONDS
        while not self._rest.markets:
            try:
                async with self._markets_lock:
                    await self._rest.load_markets()
            except VenueRefused:
                raise
            except SourceError as error:
                _log.warning("markets cannot be had", venue=self.venue, why=str(error))
                jitter = self._random.uniform(0.5, 1.0)
                await self._clock.sleep(max(error.retry_after, pause * jitter))
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def _venue_time(self) -> int:
        """UTC ms by the exchange's clock, or somewhat less; by ours where it does not say."""
        uptime = asyncio.get_running_loop().time
        async with self._clock_lock:
            before = self._clock.now()
            if self._rest.has("fetchTime") is True and self._venue_clock.needs_update(
                before, uptime()
            ):
                said = await self._rest.server_time()
                self._venue_clock.update(before, said, self._clock.now(), uptime())
                if abs(self._venue_clock.offset) >= _NOTABLE_OFFSET_MS:
                    self._factory.cooldown.on_event("clock skewed")
                    ms = -self._venue_clock.offset
                    _log.warning("our clock differs from the venue's", venue=self.venue, ms=ms)
        return self._venue_clock.lower_bound(self._clock.now())


def _first_refusal(group: BaseExceptionGroup[VenueRefused]) -> VenueRefused:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, VenueRefused)  # noqa: S101 - the group holds nothing else
    return error
