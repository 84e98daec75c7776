"""Symbols of Binance and their unified names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kronos_connectors._shared.symbol_hints import suggest_symbols

SPOT_INTERVALS = (
    *("1s", "1m", "3m", "5m", "15m", "30m", "1h", "2h", "4h", "6h", "8h", "12h"),
    *("1d", "3d", "1w", "1M"),
)
FUTURES_INTERVALS = SPOT_INTERVALS[1:]


class Listing:
    """Symbols that a market lists: unified name → Binance's, and those that do not trade now.

    Futures are perpetuals only: the others expire.
    """

    def __init__(self, infos: Iterable[Mapping[str, Any]], *, futures: bool) -> None:
        self._names: dict[str, str] = {}
        self._halted: dict[str, str] = {}
        for info in infos:
            base, quote, name = info.get("baseAsset"), info.get("quoteAsset"), info.get("symbol")
            if not (base and quote and isinstance(name, str)):
                continue
            unified = f"{base}/{quote}"
            if futures:
                if not str(info.get("contractType")).endswith("PERPETUAL"):
                    continue
                unified += f":{info.get('marginAsset', quote)}"
            self._names[unified] = name
            if info.get("status") != "TRADING":
                self._halted[unified] = str(info.get("status"))

    def venue_symbol(self, symbol: str) -> str | None:
        """Binance's name of a unified symbol; None if it is not listed."""
        return self._names.get(symbol)

    def halted_status(self, symbol: str) -> str | None:
        """Status of a symbol that is listed but does not trade now."""
        return self._halted.get(symbol)

    def unsupported_reason(self, symbol: str) -> str | None:
        """Why there are no bars of ``symbol``; None if there are."""
        if symbol in self._names:
            return None
        trading = self._names.keys() - self._halted.keys()
        hint = suggest_symbols(symbol, sorted(trading), 1, ignore_settlement=True)
        return f"binance does not list it{hint}"

    def ranked(self, turnover: Mapping[str, float]) -> list[str]:
        """Symbols that trade now, by descending ``turnover``, given by Binance's names."""
        trading = self._names.keys() - self._halted.keys()
        return sorted(trading, key=lambda one: (-turnover.get(self._names[one], 0.0), one))
