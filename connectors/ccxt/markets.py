"""What an exchange lists, as ccxt tells it: whether a series can be followed, and if not, why."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from kronos_stream.market.series import Series

Markets = Mapping[str, Mapping[str, Any]]
"""Unified symbol → ccxt's description of the market."""

_MAX_SUGGESTIONS = 3


def unsupported_reason(
    series: Series, markets: Markets, timeframes: Collection[str], exchange: str
) -> str | None:
    """Why there can be no bars of ``series``, if so; one clause for people."""
    market = markets.get(series.symbol)
    if market is None:
        return f"{exchange} does not list it{_hint(series.symbol, markets)}"
    if market.get("expiry"):
        on = f" on {market['expiryDatetime']:.10}" if market.get("expiryDatetime") else ""
        return f"it expires{on}; only what does not end can be followed"
    if str(series.timeframe) not in timeframes:
        return f"{exchange} has no bars of {series.timeframe}, only {', '.join(timeframes)}"
    return None


def inactive(series: Series, markets: Markets) -> bool:
    """Whether it is listed, but does not trade now."""
    return markets[series.symbol].get("active") is False


def _hint(symbol: str, markets: Markets) -> str:
    # People write BTCUSDT or btc/usdt for BTC/USDT; the letters are the same.
    plain: dict[str, str] = {}
    for known, market in markets.items():
        if market.get("active") is not False and not market.get("expiry"):
            plain.setdefault(_alphanumeric(known), known)
    near = get_close_matches(_alphanumeric(symbol), plain, _MAX_SUGGESTIONS, 0.7)
    return f"; did you mean {' or '.join(plain[one] for one in near)}?" if near else ""


def _alphanumeric(symbol: str) -> str:
    return "".join(filter(str.isalnum, symbol)).upper()
