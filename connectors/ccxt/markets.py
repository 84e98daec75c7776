"""Markets that an exchange lists, and why a series is not supported."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from kronos_connectors._shared.symbol_hints import suggest_symbols
from kronos_stream.market.series import Series

Markets = Mapping[str, Mapping[str, Any]]
"""Unified symbol → ccxt's description of the market."""

_MAX_SUGGESTIONS = 3


def unsupported_reason(
    series: Series, markets: Markets, timeframes: Collection[str], exchange: str
) -> str | None:
    """Why there are no bars of ``series``; None if there are."""
    market = markets.get(series.symbol)
    if market is None:
        listed = [
            name
            for name, market in markets.items()
            if market.get("active") is not False and not market.get("expiry")
        ]
        hint = suggest_symbols(series.symbol, listed, _MAX_SUGGESTIONS)
        return f"{exchange} does not list it{hint}"
    if market.get("expiry"):
        on = f" on {market['expiryDatetime']:.10}" if market.get("expiryDatetime") else ""
        return f"it expires{on}; only markets without expiry are supported"
    if str(series.timeframe) not in timeframes:
        return f"{exchange} has no bars of {series.timeframe}, only {', '.join(timeframes)}"
    return None


def inactive(series: Series, markets: Markets) -> bool:
    """Return whether a listed series does not trade now."""
    return markets[series.symbol].get("active") is False
