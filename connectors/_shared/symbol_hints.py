"""Suggestions for symbols that a venue does not list."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def suggest_symbols(
    symbol: str, known: Iterable[str], limit: int, *, ignore_settlement: bool = False
) -> str:
    """``; did you mean BTC/USDT?`` for BTCUSDT or btc-usdt; empty if nothing is similar.

    ignore_settlement: compare only what precedes the colon of BTC/USDT:USDT.
    """

    def normalized(name: str) -> str:
        name = name.partition(":")[0] if ignore_settlement else name
        return "".join(filter(str.isalnum, name)).upper()

    names: dict[str, str] = {}
    for name in known:
        names.setdefault(normalized(name), name)
    near = get_close_matches(normalized(symbol), names, limit, 0.7)
    return f"; did you mean {' or '.join(names[one] for one in near)}?" if near else ""
