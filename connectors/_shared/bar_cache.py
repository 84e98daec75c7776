"""The candles that a feed has brought lately: its history, where it offers none of its own."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Sequence

from kronos_stream.market.candle import Candle
from kronos_stream.market.series import Series


class RecentBars:
    """The newest ``capacity`` closed bars of each series, as they were said last."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._bars: dict[Series, dict[int, Candle]] = {}
        self._order: dict[Series, list[int]] = {}

    def add(self, series: Series, candle: Candle) -> None:
        """Keep a closed bar; what was known of it before is forgotten."""
        bars = self._bars.setdefault(series, {})
        order = self._order.setdefault(series, [])
        if candle.time not in bars:
            insort(order, candle.time)
        bars[candle.time] = candle
        if len(order) > self._capacity:
            del bars[order.pop(0)]

    def between(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        """The bars with start <= open < end, UTC ms, ascending."""
        order = self._order.get(series, [])
        bars = self._bars.get(series, {})
        return [bars[time] for time in order[bisect_left(order, start) : bisect_left(order, end)]]

    def retain(self, series: Collection[Series]) -> None:
        """Forget all others."""
        for gone in self._bars.keys() - set(series):
            del self._bars[gone], self._order[gone]
