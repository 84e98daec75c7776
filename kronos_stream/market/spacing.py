"""How bars are spaced in time: their timeframe, and the holes between them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kronos_stream.market.timeframe import Timeframe


def find_gaps(times: NDArray[np.int64], timeframe: Timeframe) -> list[tuple[int, int]]:
    """Holes in ``times`` (N,), UTC ms: (open time of the bar before, number of bars missing)."""
    gaps = []
    for i in np.flatnonzero(np.diff(times) > timeframe.min_milliseconds):
        before, after = int(times[i]), int(times[i + 1])
        missing = _bars_between(before, after, timeframe)
        if missing:
            gaps.append((before, missing))
    return gaps


def common_step(times: NDArray[np.int64]) -> int:
    """The most frequent distance in ms between neighbours of ``times`` (N >= 2,); ties: least."""
    steps, counts = np.unique(np.diff(times), return_counts=True)
    return int(steps[np.argmax(counts)])


def infer_timeframe(times: NDArray[np.int64]) -> Timeframe:
    """The timeframe most bars keep; ValueError where the step between them is none."""
    step = common_step(times)
    return _months(times, step) or Timeframe.from_step(step)


def _months(times: NDArray[np.int64], step: int) -> Timeframe | None:
    """Calendar months, or several, if that is how most bars follow each other."""
    if step < Timeframe(1, "M").min_milliseconds:
        return None
    months = np.diff(times.astype("datetime64[ms]").astype("datetime64[M]").astype(np.int64))
    timeframe = Timeframe(int(np.bincount(months).argmax()), "M")
    opens = times.tolist()
    kept = sum(timeframe.after(a) == b for a, b in pairwise(opens))
    return timeframe if kept > len(months) / 2 else None


def _bars_between(before: int, after: int, timeframe: Timeframe) -> int:
    """Bars of ``timeframe`` that open strictly between two bar opens, UTC ms."""
    step = timeframe.milliseconds
    if step is not None:
        return -((before - after) // step) - 1
    bars = 0
    while timeframe.after(before, bars + 1) < after:
        bars += 1
    return bars
