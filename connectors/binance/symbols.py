"""Symbols by Binance's names and by ccxt's unified ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

SPOT_INTERVALS = (
    *("1s", "1m", "3m", "5m", "15m", "30m", "1h", "2h", "4h", "6h", "8h", "12h"),
    *("1d", "3d", "1w", "1M"),
)
FUTURES_INTERVALS = SPOT_INTERVALS[1:]


class Listing:
    """What a market lists: unified symbol → Binance's, and which of them do not trade.

    Of futures only the perpetuals: others end, and a series does not.
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
        """Binance's own name of it."""
        return self._names.get(symbol)

    def halted_status(self, symbol: str) -> str | None:
        """The status of a symbol that is listed but does not trade now."""
        return self._halted.get(symbol)

    def unsupported_reason(self, symbol: str) -> str | None:
        """Why there can be no bars of ``symbol``, if so."""
        if symbol in self._names:
            return None
        return "binance does not list it" + self._hint(symbol)

    def ranked(self, turnover: Mapping[str, float]) -> list[str]:
        """What trades now, by ``turnover`` under Binance's names, the largest first."""
        trading = self._names.keys() - self._halted.keys()
        return sorted(trading, key=lambda one: (-turnover.get(self._names[one], 0.0), one))

    def _hint(self, symbol: str) -> str:
        # People write BTCUSDT or btc/usdt for BTC/USDT; the letters are the same.
        plain = {_alphanumeric(known): known for known in self._names if known not in self._halted}
        near = get_close_matches(_alphanumeric(symbol), plain, 1, 0.7)
        return f"; did you mean {plain[near[0]]}?" if near else ""


def _alphanumeric(symbol: str) -> str:
    return "".join(filter(str.isalnum, symbol.partition(":")[0])).upper()
