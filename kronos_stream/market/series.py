"""Series: one symbol of one venue in one timeframe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from kronos_stream.market.timeframe import Timeframe


@dataclass(frozen=True, slots=True, order=True)
class Series:
    """Series name and its parts.

    Written ``binance:BTC/USDT:5m``: the venue up to the first colon, the timeframe after the last,
    the symbol between them in ccxt's unified notation (``binance:BTC/USDT:USDT:1m`` is the linear
    perpetual). Compared, ordered and hashed by that name alone.
    """

    name: str
    venue: str = field(compare=False)
    symbol: str = field(compare=False)
    timeframe: Timeframe = field(compare=False)

    @classmethod
    def of(cls, venue: str, symbol: str, timeframe: Timeframe) -> Self:
        """Join the parts; raises ValueError if one is empty or makes the name ambiguous."""
        if not venue or ":" in venue or not symbol or symbol.strip(" :") != symbol:
            raise ValueError(
                f"series of venue {venue!r} and symbol {symbol!r}: expected names such as "
                "binance and BTC/USDT"
            )
        return cls(f"{venue}:{symbol}:{timeframe}", venue, symbol, timeframe)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``venue:symbol:timeframe``; raises ValueError naming the cause."""
        venue, _, rest = text.partition(":")
        symbol, _, timeframe = rest.rpartition(":")
        if not venue or not symbol:
            raise ValueError(
                f"series {text!r}: expected venue:symbol:timeframe, such as binance:BTC/USDT:5m"
            )
        return cls.of(venue, symbol, Timeframe.parse(timeframe))

    def __str__(self) -> str:
        return self.name
