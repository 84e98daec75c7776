"""Rolling contexts: the newest closed bars of each series, ready to be forecast from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kronos_stream.bars.scaling import price_scale, scale_prices
from kronos_stream.channels import AMOUNT, CLIP, STD_FLOOR, VOLUME
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.series import Series

_MIN_BARS = 32
"""A series that has no more than so many is forecast all the same."""

_REAL, _SYNTHETIC, _MISSING = 0, 1, 2


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """What one forecast starts from."""

    series: Series
    values: NDArray[np.float32]
    """(L, 6) open, high, low, close, volume, amount; (L, 5) if any bar lacks its amount."""
    times: NDArray[np.int64]
    """(L,) opens, UTC ms."""
    synthetic: int
    """Bars among them that the venue does not have, or has not given."""
    revision: int
    """Of the last bar."""
    last: Candle
    """The origin bar, in full precision."""
    reasons: tuple[str, ...] = ()
    """Why the forecast is degraded; empty if it is not."""


class ContextStore:
    """A buffer per series of its newest ``capacity`` bars, contiguous; no object per bar."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._buffers: dict[Series, _Buffer] = {}

    def load(self, series: Series, bars: Sequence[Bar], *, complete: bool = False) -> None:
        """Begin with ``bars``, oldest first; ``whole`` if the series has no older ones."""
        buffer = self._buffers[series] = _Buffer(self._capacity, bars)
        buffer.complete = complete

    def append(self, series: Series, bar: Bar) -> None:
        """Put the bar that follows the series' newest."""
        self._buffers[series].append(bar)

    def revise(self, series: Series, bar: Bar) -> None:
        """Replace the bar of the same open, if it is still here."""
        self._buffers[series].revise(bar)

    def supersedes(self, series: Series, bar: Bar) -> bool:
        """Whether the bar of the same open is here, and ``bar`` is a later word on it."""
        return self._buffers[series].supersedes(bar)

    def remove(self, series: Series) -> None:
        self._buffers.pop(series, None)

    def length(self, series: Series) -> int:
        """Bars that are here."""
        buffer = self._buffers.get(series)
        return 0 if buffer is None else buffer.end

    def skip_reason(self, series: Series, bars: int, *, strict: bool) -> str | None:
        """Why the series cannot be forecast from its newest ``bars``: "warming up" or "gap".

        strict: no bar among them may be one that the venue has not given yet.
        """
        if self.length(series) < min(bars, _MIN_BARS):
            return "warming up"
        if strict and (self._buffers[series].newest_marks(bars) == _MISSING).any():
            return "gap"
        return None

    def window(self, series: Series, origin: int, bars: int) -> Window | None:
        """The newest ``bars`` bars up to ``origin``, or as many as the series has; a copy.

        None where they do not all lie here.
        """
        buffer = self._buffers.get(series)
        return None if buffer is None else buffer.window(series, origin, bars)


def build_window(series: Series, bars: Sequence[Bar]) -> Window:
    """The same of bars that lie elsewhere, oldest first, at least one."""
    window = _Buffer(len(bars), bars).window(series, bars[-1].candle.time, len(bars))
    assert window is not None  # noqa: S101 - it has what it was made of
    return window


class _Buffer:
    """Columns with some room at the end, so that bars are seldom moved.

    Values are kept in double precision: the last bar of a window is told as it came.
    """

    __slots__ = ("_capacity", "_marks", "_revisions", "_times", "_values", "complete", "end")

    def __init__(self, capacity: int, bars: Sequence[Bar] = ()) -> None:
        self._capacity = capacity
        size = capacity + capacity // 8 + 1
        self._values = np.empty((size, 6), np.float64)
        self._times = np.empty(size, np.int64)
        self._revisions = np.empty(size, np.int32)
        self._marks = np.empty(size, np.uint8)
        self.end = 0
        self.complete = True
        """Whether the first bar here is the first the series has."""
        for bar in bars:
            self.append(bar)

    def append(self, bar: Bar) -> None:
        if self.end == len(self._times):
            first = self.end - self._capacity
            for column in (self._values, self._times, self._revisions, self._marks):
                column[: self._capacity] = column[first:]
            self.end, self.complete = self._capacity, False
        self._write(self.end, bar)
        self.end += 1

    def revise(self, bar: Bar) -> None:
        at = self._find(bar.candle.time)
        if at is not None:
            self._write(at, bar)

    def supersedes(self, bar: Bar) -> bool:
        at = self._find(bar.candle.time)
        if at is None:
            return False
        if (known := int(self._revisions[at])) != bar.revision:
            return bar.revision > known
        return bool(self._marks[at] == _MISSING) and _mark(bar) != _MISSING

    def newest_marks(self, bars: int) -> NDArray[np.uint8]:
        return self._marks[max(0, self.end - bars) : self.end]

    def window(self, series: Series, origin: int, bars: int) -> Window | None:
        at = self._find(origin)
        if at is None or (at + 1 < bars and not self.complete):
            return None
        part = slice(max(0, at + 1 - bars), at + 1)
        values = self._values[part]
        columns = AMOUNT if np.isnan(values[:, AMOUNT]).any() else AMOUNT + 1
        opened, high, low, close, volume, amount = values[-1].tolist()
        last = Candle(origin, opened, high, low, close, volume, amount if amount >= 0 else None)
        narrow = np.ascontiguousarray(values[:, :columns], np.float32)
        reasons = _mark_reasons(self._marks[part])
        if _clipped(narrow):
            reasons = (*reasons, "last bar clipped")
        return Window(
            series,
            narrow,
            self._times[part].copy(),
            int(np.count_nonzero(self._marks[part])),
            int(self._revisions[at]),
            last,
            reasons,
        )

    def _write(self, at: int, bar: Bar) -> None:
        (time, *prices, amount), revision, *_ = bar
        self._values[at] = (*prices, np.nan if amount is None else amount)
        self._times[at] = time
        self._revisions[at] = revision
        self._marks[at] = _mark(bar)

    def _find(self, time: int) -> int | None:
        if self.end and self._times[self.end - 1] == time:
            return self.end - 1
        at = int(np.searchsorted(self._times[: self.end], time))
        return at if at < self.end and self._times[at] == time else None


def _mark(bar: Bar) -> int:
    return _REAL if not bar.synthetic else _SYNTHETIC if bar.received else _MISSING


def _mark_reasons(marks: NDArray[np.uint8]) -> tuple[str, ...]:
    counts = {
        "synthetic": int(np.count_nonzero(marks == _SYNTHETIC)),
        "missing": int(np.count_nonzero(marks == _MISSING)),
    }
    return tuple(
        f"{count} {kind} bar{'s' if count > 1 else ''}" for kind, count in counts.items() if count
    )


def _clipped(values: NDArray[np.float32]) -> bool:
    """Return whether normalisation clips the last bar in any channel."""
    scaled = scale_prices(values, price_scale(values)).astype(np.float64)
    if scaled.shape[1] == AMOUNT:
        derived = scaled[:, VOLUME] * scaled[:, :VOLUME].mean(axis=1)
        scaled = np.column_stack((scaled, derived))
    distance = np.abs(scaled[-1] - scaled.mean(axis=0))
    return bool((distance > CLIP * (scaled.std(axis=0) + STD_FLOOR)).any())
