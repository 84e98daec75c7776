"""Cache of recent bars, for venues without history requests."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Sequence

from kronos_stream.market.candle import Candle
from kronos_stream.market.series import Series


class RecentBars:
    """Newest ``capacity`` closed bars of each series, in their latest version."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._bars: dict[Series, dict[int, Candle]] = {}
        self._order: dict[Series, list[int]] = {}

    def add(self, series: Series, candle: Candle) -> None:
        """Add a closed bar, or replace its earlier version."""
        bars = self._bars.setdefault(series, {})
        order = self._order.setdefault(series, [])
        if candle.time not in bars:
            insort(order, candle.time)
        bars[candle.time] = candle
        if len(order) > self._capacity:
            del bars[order.pop(0)]

    def between(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        """Bars with start <= open < end, UTC ms, ascending."""
        order = self._order.get(series, [])
        bars = self._bars.get(series, {})
        return [bars[time] for time in order[bisect_left(order, start) : bisect_left(order, end)]]

    def retain(self, series: Collection[Series]) -> None:
        """Drop the bars of all other series."""
        for gone in self._bars.keys() - set(series):
            del self._bars[gone], self._order[gone]
