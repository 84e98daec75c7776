"""Watchlist: symbols to forecast, by name or as the most traded ones of a pattern.

::

    binance:BTC/USDT
    binance:BTC/USDT 1m,1h            # in these timeframes, in a file
    binance:*/USDT?top=50             # the fifty most traded of the last 24 hours
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple, Self

from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

_HYSTERESIS = 1.2
"""A symbol stays until its rank exceeds ``top`` times this: ranks near ``top`` change daily, and a
new symbol has no history here."""


class WatchlistEntry(NamedTuple):
    """One line of the watchlist."""

    venue: str
    symbol: str
    """Symbol, or a pattern with * for any characters."""
    top: int | None = None
    """Limit of a pattern's symbols; None for all."""
    timeframes: tuple[Timeframe, ...] = ()
    """Empty if those of the settings apply."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``venue:symbol``, ``?top=`` and timeframes. Raises ValueError naming the cause."""
        name, *lengths = text.split(maxsplit=1) or [""]
        listed = lengths[0].split(",") if lengths else []
        timeframes = tuple(Timeframe.parse(length.strip()) for length in listed)
        venue, _, rest = name.partition(":")
        symbol, query, top = rest.partition("?")
        if not venue or not symbol:
            raise ValueError(f"{text!r}: expected venue:symbol, such as binance:BTC/USDT")
        if re.fullmatch(r"\d+[smhdwM]", symbol.rpartition(":")[2]):
            raise ValueError(
                f"{text!r} ends in a timeframe; leave it out: every symbol is forecast in each of "
                "KRONOS_STREAM_TIMEFRAMES"
            )
        count = re.fullmatch(r"top=([1-9]\d{0,4})", top)
        if query and (count is None or "*" not in symbol):
            raise ValueError(f"{text!r}: expected a pattern such as binance:*/USDT?top=50")
        Series.of(venue, symbol, Timeframe(1, "m"))
        return cls(venue, symbol, int(count[1]) if count else None, timeframes)

    def __str__(self) -> str:
        return f"{self.venue}:{self.symbol}" + ("" if self.top is None else f"?top={self.top}")

    @property
    def is_pattern(self) -> bool:
        return "*" in self.symbol

    def matches(self, symbol: str) -> bool:
        return fnmatchcase(symbol, self.symbol.replace("[", "[[]"))

    def series(self, symbols: Sequence[str] | None = None) -> Iterator[Series]:
        """Series of the symbol, or of a pattern's ``symbols``, in the entry's timeframes."""
        for symbol in [self.symbol] if symbols is None else symbols:
            for timeframe in self.timeframes:
                yield Series.of(self.venue, symbol, timeframe)

    def select(self, ranked: Sequence[str], current: Collection[str]) -> list[str]:
        """Select the pattern's symbols from ``ranked``, a venue's, the most traded first.

        current: the selection so far. Those stay, within ``top``, until their rank is much worse.
        """
        matching = [symbol for symbol in ranked if self.matches(symbol)]
        if self.top is None:
            return matching
        kept = [symbol for symbol in matching[: int(self.top * _HYSTERESIS)] if symbol in current]
        kept = kept[: self.top]
        new = [symbol for symbol in matching if symbol not in kept]
        return kept + new[: self.top - len(kept)]
