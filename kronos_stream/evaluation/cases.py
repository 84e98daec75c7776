"""Walk-forward cases: the history up to an origin, and the bars that followed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kronos_stream.market.candle_files import read_candles
from kronos_stream.market.timeframe import Timeframe


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """Input of a forecast: ``values`` (L, 6) in price units, ``times`` (L,) bar opens, UTC ms."""

    series: str
    timeframe: str
    values: NDArray[np.float64]
    times: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A history and its ``future`` (H, 6), which is never passed to a forecast.

    Cases of one ``block`` are of the same time and are resampled together. ``truth`` holds paths
    (m, H, 6) of the generating process, if it is known.
    """

    history: History
    future: NDArray[np.float64]
    block: int
    truth: NDArray[np.float64] | None = None


class ForecastFunction(Protocol):
    """A forecast under evaluation."""

    def __call__(
        self, histories: Sequence[History], horizon: int, paths: int, /
    ) -> list[NDArray[np.floating]]:
        """Sample paths (paths, horizon, 6) of each history, in price units."""
        ...


def file_cases(
    paths: Sequence[Path],
    *,
    lookback: int,
    horizon: int,
    stride: int,
    timeframe: Timeframe | None = None,
) -> Iterator[Case]:
    """Yield a case every ``stride`` bars of every file; no case contains a gap.

    A block is as long as a lookback and its horizon. Raises CandleFileError for a bad file.
    """
    for path in paths:
        table = read_candles(path, timeframe)
        span = (lookback + horizon) * (
            table.timeframe.milliseconds or int(np.diff(table.times).max(initial=1))
        )
        for first, end in table.contiguous_ranges():
            for origin in range(first + lookback, end - horizon + 1, stride):
                known = slice(origin - lookback, origin)
                history = History(
                    path.name, str(table.timeframe), table.values[known], table.times[known]
                )
                future = table.values[origin : origin + horizon]
                yield Case(history, future, int(table.times[origin - 1]) // span)
