"""What is wanted to be forecast: symbols by name, or the most traded ones of a pattern.

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
"""A symbol stays until its rank is worse than this times what was asked for: at the margin ranks
change daily, and a newcomer has no history here."""


class WatchlistEntry(NamedTuple):
    """One line of the list."""

    venue: str
    symbol: str
    """Or a pattern: * stands for anything."""
    top: int | None = None
    """Of a pattern, how many symbols at most; None for all."""
    timeframes: tuple[Timeframe, ...] = ()
    """None where those of the settings count."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``venue:symbol``, with what may follow. Raises ValueError naming what is wrong."""
        name, *rest = text.split(maxsplit=1) or [""]
        lengths = rest[0].split(",") if rest else []
        timeframes = tuple(Timeframe.parse(length.strip()) for length in lengths)
        venue, _, asked = name.partition(":")
        symbol, mark, top = asked.partition("?")
        if not venue or not symbol:
            raise ValueError(f"{text!r}: expected venue:symbol, such as binance:BTC/USDT")
        if re.fullmatch(r"\d+[smhdwM]", symbol.rpartition(":")[2]):
            raise ValueError(
                f"{text!r} ends in a timeframe; leave it out: every symbol is forecast in each of "
                "KRONOS_STREAM_TIMEFRAMES"
            )
        count = re.fullmatch(r"top=([1-9]\d{0,4})", top)
        if mark and (count is None or "*" not in symbol):
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
        """Those of the symbol, or of ``symbols`` that a pattern chose; it knows its timeframes."""
        for symbol in [self.symbol] if symbols is None else symbols:
            for timeframe in self.timeframes:
                yield Series.of(self.venue, symbol, timeframe)

    def select(self, ranked: Sequence[str], current: Collection[str]) -> list[str]:
        """Which symbols the pattern means, out of a venue's, the most traded first.

        held: what it meant before. Those stay while they are not far down, and count.
        """
        matching = [symbol for symbol in ranked if self.matches(symbol)]
        if self.top is None:
            return matching
        kept = [symbol for symbol in matching[: int(self.top * _HYSTERESIS)] if symbol in current]
        kept = kept[: self.top]
        new = [symbol for symbol in matching if symbol not in kept]
        return kept + new[: self.top - len(kept)]
