"""Source of Binance: its spot and futures markets."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from random import Random

from kronos_connectors.binance.market import Market
from kronos_connectors.binance.options import BinanceOptions
from kronos_stream.errors import first_error
from kronos_stream.interfaces.diagnostics import Check
from kronos_stream.interfaces.source import SourceCallbacks, Traits, VenueRefused
from kronos_stream.market.candle import Candle
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series


class BinanceSource:
    """Klines of spot markets, ``BTC/USDT``, and of USD-M perpetuals, ``BTC/USDT:USDT``."""

    venue = "binance"
    # History has flat bars for intervals without trades, so a missing bar is late or lost.
    # Perpetuals are pushed only while they trade; history then has the closed bar.
    traits = Traits(push_seconds=2.0, grace_seconds=2.0, fills_empty=True)

    def __init__(self, options: BinanceOptions, clock: Clock, random: Random) -> None:
        self._markets = {
            futures: Market(options, clock, random, futures=futures) for futures in (False, True)
        }

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:
        found: dict[Series, str] = {}
        for futures, market in self._markets.items():
            of_market = [one for one in series if _is_futures(one) is futures]
            if of_market:
                found |= await market.unsupported(of_market)
        return found

    async def ranked(self, pattern: str) -> Sequence[str]:
        return await self._markets[":" in pattern].ranked()

    def checks(self, series: Collection[Series]) -> Sequence[Check]:
        found: list[Check] = []
        for futures, market in self._markets.items():
            if of_market := [one for one in series if _is_futures(one) is futures]:
                found += market.checks(of_market)
        return found

    def subscribe(self, series: Collection[Series]) -> None:
        for futures, market in self._markets.items():
            market.subscribe([one for one in series if _is_futures(one) is futures])

    async def run(self, callbacks: SourceCallbacks) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for market in self._markets.values():
                    tasks.create_task(market.run(callbacks))
        except* VenueRefused as refusals:
            raise first_error(refusals) from None

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        return await self._markets[_is_futures(series)].history(series, start, end)

    async def close(self) -> None:
        for market in self._markets.values():
            await market.close()


def _is_futures(series: Series) -> bool:
    return ":" in series.symbol


def build(_: str, options: BinanceOptions, clock: Clock, random: Random) -> BinanceSource:
    """Create a source; it connects when it runs."""
    return BinanceSource(options, clock, random)
