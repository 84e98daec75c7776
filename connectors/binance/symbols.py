"""Symbols by Binance's names and by ccxt's unified ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from kronos_stream.market.series import Series

INTERVALS = frozenset(
    ("1m", "3m", "5m", "15m", "30m", "1h", "2h", "4h", "6h", "8h", "12h", "1d", "3d", "1w", "1M")
)
SPOT_INTERVALS = INTERVALS | {"1s"}


def is_futures(series: Series) -> bool:
    """Whether its symbol is a linear perpetual's, such as BTC/USDT:USDT."""
    return ":" in series.symbol


class Listing:
    """What a host lists: unified symbol → Binance's, those that trade and those that do not."""

    def __init__(self, infos: Iterable[Mapping[str, Any]], *, futures: bool) -> None:
        self._futures = futures
        self._names: dict[str, str] = {}
        self._halted: dict[str, str] = {}
        for info in infos:
            base, quote, name = info.get("baseAsset"), info.get("quoteAsset"), info.get("symbol")
            if futures and info.get("contractType") not in (None, "PERPETUAL"):
                continue
            unified = (
                f"{base}/{quote}:{info.get('marginAsset', quote)}" if futures else f"{base}/{quote}"
            )
            self._names[unified] = str(name)
            if info.get("status") != "TRADING":
                self._halted[unified] = str(info.get("status"))

    def name(self, series: Series) -> str | None:
        return self._names.get(series.symbol)

    def problem(self, series: Series) -> str | None:
        """Why there are no bars of ``series``, if so."""
        intervals = INTERVALS if self._futures else SPOT_INTERVALS
        if str(series.timeframe) not in intervals:
            return f"binance has no bars of {series.timeframe}: {', '.join(sorted(intervals))}"
        if series.symbol not in self._names:
            near = get_close_matches(series.symbol, self._names, 1)
            return "binance does not list it" + (f"; did you mean {near[0]}?" if near else "")
        if series.symbol in self._halted:
            return f"does not trade now (status {self._halted[series.symbol]})"
        return None
