"""Candles: as connectors push them, and as confirmed bars."""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple

from kronos_stream.market.series import Series

MAX_FLOAT32 = 3.4028234e38
"""Largest value that the model can compute with."""

MAX_TIME_MS = 7_258_118_400_000
"""The year 2200; a venue's bar that opens later is invalid."""


class Candle(NamedTuple):
    """Open time, UTC ms; prices; volume in base units; amount in quote units.

    ``amount`` is None where the venue does not report it.
    """

    time: int
    open: float
    high: float
    low: float
    close: float
    volume: float
    amount: float | None = None

    def invalid_reason(self) -> str | None:
        """Return why this candle is impossible, in one clause, or None."""
        _, opened, high, low, close, volume, amount = self
        numbers = (opened, high, low, close, volume, 0.0 if amount is None else amount)
        if not all(isfinite(number) and abs(number) <= MAX_FLOAT32 for number in numbers):
            return "a value is not a finite float32"
        if low <= 0:
            return f"low {low:g} is not a price"
        if high < low or not low <= opened <= high or not low <= close <= high:
            return f"high {high:g} and low {low:g} do not enclose open {opened:g}, close {close:g}"
        if volume < 0 or (amount is not None and amount < 0):
            return "volume or amount is negative"
        return None


class Update(NamedTuple):
    """A push of a connector: the candle of an open or closed bar."""

    series: Series
    candle: Candle
    closed: bool
    """True if the venue reports the bar closed."""
    received: int
    """UTC ms by the daemon's clock."""


class Bar(NamedTuple):
    """A closed bar."""

    candle: Candle
    revision: int = 0
    """Number of corrections after its close."""
    synthetic: bool = False
    """True if the venue has no such bar: flat, without volume."""
    received: int = 0
    """UTC ms when its present content arrived; 0 for a placeholder."""
