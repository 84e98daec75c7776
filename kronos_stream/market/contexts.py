"""Rolling contexts: the newest closed bars of each series as the model will see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.series import Series

_CLIP, _STD_FLOOR = 5.0, 1e-5
"""As the model normalises (kronos_stream.model.inputs, which cannot be imported without torch)."""

_AMOUNT = 5


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """What one forecast starts from."""

    series: Series
    values: NDArray[np.float32]
    """(L, 6) open, high, low, close, volume, amount; (L, 5) if any bar lacks its amount."""
    times: NDArray[np.int64]
    """(L,) opens, UTC ms."""
    synthetic: int
    """Bars among them that the venue does not have."""
    revision: int
    """Of the last bar."""
    last: Candle
    """The origin bar, in full precision."""
    reasons: tuple[str, ...] = ()
    """Why the forecast is degraded; empty if it is not."""


class Contexts:
    """A buffer per series, of the newest ``capacity`` bars."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._buffers: dict[Series, _Buffer] = {}

    def append(self, series: Series, bar: Bar) -> None:
        """Put the bar that follows the series' newest."""
        buffer = self._buffers.get(series)
        if buffer is None:
            buffer = self._buffers[series] = _Buffer(self._capacity)
        buffer.append(bar)

    def revise(self, series: Series, bar: Bar) -> None:
        """Replace the bar of the same open, if it is still here."""
        self._buffers[series].revise(bar)

    def forget(self, series: Series) -> None:
        self._buffers.pop(series, None)

    def length(self, series: Series) -> int:
        """Bars that are here."""
        buffer = self._buffers.get(series)
        return 0 if buffer is None else buffer.length

    def window(self, series: Series, origin: int, bars: int) -> Window | None:
        """The newest ``bars`` bars up to ``origin``, or as many as there are; a copy.

        None where the buffer reaches neither so far back as to hold all of them, nor all that the
        series has.
        """
        buffer = self._buffers.get(series)
        return None if buffer is None else buffer.window(series, origin, bars)


def window_of(series: Series, bars: Sequence[Bar]) -> Window:
    """The same of bars that lie elsewhere, oldest first."""
    rows = [_row(bar) for bar in bars]
    return _window(
        series,
        np.array(rows, np.float32),
        np.array([bar.candle.time for bar in bars], np.int64),
        sum(bar.synthetic for bar in bars),
        bars[-1],
    )


class _Buffer:
    """Twice the capacity, so that bars are moved only once in ``capacity`` appends."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values = np.empty((2 * capacity, 6), np.float32)
        self._times = np.empty(2 * capacity, np.int64)
        self._synthetic = np.zeros(2 * capacity, np.bool_)
        self._bars: dict[int, Bar] = {}
        self._end = 0
        self._whole = True
        """Whether the first bar here is the first the series has had."""

    @property
    def length(self) -> int:
        return self._end

    def append(self, bar: Bar) -> None:
        if self._end == len(self._times):
            kept = slice(self._end - self._capacity, self._end)
            for column in (self._values, self._times, self._synthetic):
                column[: self._capacity] = column[kept]
            self._end, self._whole = self._capacity, False
        self._write(self._end, bar)
        self._end += 1

    def revise(self, bar: Bar) -> None:
        at = self._index(bar.candle.time)
        if at is not None:
            self._write(at, bar)

    def window(self, series: Series, origin: int, bars: int) -> Window | None:
        at = self._index(origin)
        if at is None or (at + 1 < bars and not self._whole):
            return None
        part = slice(max(0, at + 1 - bars), at + 1)
        last = self._bars.get(origin)
        if last is None:
            return None
        return _window(
            series,
            self._values[part].copy(),
            self._times[part].copy(),
            int(self._synthetic[part].sum()),
            last,
        )

    def _write(self, at: int, bar: Bar) -> None:
        self._values[at] = _row(bar)
        self._times[at] = bar.candle.time
        self._synthetic[at] = bar.synthetic
        self._bars[bar.candle.time] = bar
        if len(self._bars) > _ORIGINS:
            del self._bars[next(iter(self._bars))]

    def _index(self, time: int) -> int | None:
        at = int(np.searchsorted(self._times[: self._end], time))
        return at if at < self._end and self._times[at] == time else None


_ORIGINS = 64
"""Newest bars kept in full precision: origins that may still be forecast from here."""


def _row(bar: Bar) -> tuple[float, ...]:
    candle = bar.candle
    return (*candle[1:6], np.nan if candle.amount is None else candle.amount)


def _window(
    series: Series,
    values: NDArray[np.float32],
    times: NDArray[np.int64],
    synthetic: int,
    last: Bar,
) -> Window:
    if np.isnan(values[:, _AMOUNT]).any():
        values = np.ascontiguousarray(values[:, :_AMOUNT])
    reasons = []
    if synthetic:
        reasons.append(f"{synthetic} synthetic bars" if synthetic > 1 else "1 synthetic bar")
    spread = values.std(axis=0) + _STD_FLOOR
    if (np.abs(values[-1] - values.mean(axis=0)) > _CLIP * spread).any():
        reasons.append("last bar clipped")
    return Window(series, values, times, synthetic, last.revision, last.candle, tuple(reasons))
