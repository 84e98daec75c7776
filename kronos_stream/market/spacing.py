"""Spacing of bars in time: their timeframe, and the gaps between them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kronos_stream.market.timeframe import Timeframe


def find_gaps(times: NDArray[np.int64], timeframe: Timeframe) -> list[tuple[int, int]]:
    """Gaps in ``times`` (N,), UTC ms: (open time of the bar before, number of missing bars)."""
    gaps = []
    for i in np.flatnonzero(np.diff(times) > timeframe.min_milliseconds):
        before, after = int(times[i]), int(times[i + 1])
        missing = timeframe.bars_between(before, after - 1)
        if missing:
            gaps.append((before, missing))
    return gaps


def common_step(times: NDArray[np.int64]) -> int:
    """Most frequent distance in ms of neighbours in ``times`` (N >= 2,); the least of equals."""
    steps, counts = np.unique(np.diff(times), return_counts=True)
    return int(steps[np.argmax(counts)])


def infer_timeframe(times: NDArray[np.int64]) -> Timeframe:
    """Timeframe of most bars; raises ValueError if none has their step."""
    step = common_step(times)
    return _months(times, step) or Timeframe.from_step(step)


def _months(times: NDArray[np.int64], step: int) -> Timeframe | None:
    """Timeframe in calendar months, if most bars follow each other so."""
    if step < Timeframe(1, "M").min_milliseconds:
        return None
    months = np.diff(times.astype("datetime64[ms]").astype("datetime64[M]").astype(np.int64))
    timeframe = Timeframe(int(np.bincount(months).argmax()), "M")
    opens = times.tolist()
    regular = sum(timeframe.after(a) == b for a, b in pairwise(opens))
    return timeframe if regular > len(months) / 2 else None
