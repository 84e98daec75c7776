"""Rolling contexts: the newest closed bars of a series."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kronos_stream.bars.window import MISSING, Window, bar_kind, bar_values, window_of_rows
from kronos_stream.market.candle import Bar
from kronos_stream.market.series import Series

_MIN_BARS = 32
"""Bars that suffice for a forecast, if the series has no more."""


class ContextBuffer:
    """Contiguous buffer of a series' newest bars, without an object per bar.

    Its columns have spare room at the end, so that bars are seldom moved. Values are kept in double
    precision: messages repeat the last bar exactly.
    """

    def __init__(
        self, series: Series, capacity: int, bars: Sequence[Bar] = (), *, complete: bool = True
    ) -> None:
        """Start with ``bars``, oldest first; ``complete`` if the series has no older ones."""
        self._series, self._capacity = series, capacity
        self._complete = True
        size = capacity + capacity // 8 + 1
        self._values = np.empty((size, 6), np.float64)
        self._times = np.empty(size, np.int64)
        self._revisions = np.empty(size, np.int32)
        self._kinds = np.empty(size, np.uint8)
        self._end = 0
        for bar in bars:
            self.append(bar)
        self._complete = complete

    def append(self, bar: Bar) -> None:
        """Add the bar that follows the newest."""
        if self._end == len(self._times):
            first = self._end - self._capacity
            for column in (self._values, self._times, self._revisions, self._kinds):
                column[: self._capacity] = column[first:]
            self._end, self._complete = self._capacity, False
        self._write(self._end, bar)
        self._end += 1

    def revise(self, bar: Bar) -> None:
        """Replace the bar of the same open, if it is still in the buffer."""
        row = self._find(bar.candle.time)
        if row is not None:
            self._write(row, bar)

    def supersedes(self, bar: Bar) -> bool:
        """Return whether ``bar`` is newer than the stored bar of the same open."""
        row = self._find(bar.candle.time)
        if row is None:
            return False
        if (stored := int(self._revisions[row])) != bar.revision:
            return bar.revision > stored
        return bool(self._kinds[row] == MISSING) and bar_kind(bar) != MISSING

    def skip_reason(self, bars: int, *, strict: bool) -> str | None:
        """Return "warming up" or "gap" if the newest ``bars`` bars do not suffice, else None.

        strict: a bar that the venue has not delivered is a gap.
        """
        if self._end < min(bars, _MIN_BARS):
            return "warming up"
        if strict and (self._kinds[max(0, self._end - bars) : self._end] == MISSING).any():
            return "gap"
        return None

    def window(self, origin: int, bars: int) -> Window | None:
        """Copy the newest ``bars`` bars up to ``origin``, or as many as the series has.

        None if some of them are not in the buffer.
        """
        last = self._find(origin)
        if last is None or (last + 1 < bars and not self._complete):
            return None
        rows = slice(max(0, last + 1 - bars), last + 1)
        revision = int(self._revisions[last])
        return window_of_rows(
            self._series, self._values[rows], self._times[rows], self._kinds[rows], revision
        )

    def _write(self, row: int, bar: Bar) -> None:
        self._values[row] = bar_values(bar)
        self._times[row] = bar.candle.time
        self._revisions[row] = bar.revision
        self._kinds[row] = bar_kind(bar)

    def _find(self, time: int) -> int | None:
        if self._end and self._times[self._end - 1] == time:
            return self._end - 1
        row = int(np.searchsorted(self._times[: self._end], time))
        return row if row < self._end and self._times[row] == time else None
