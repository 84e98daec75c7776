"""A forecast of one series for display: the closes of all paths, and their quantiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kronos_stream.forecast.quantiles import quantile_name, weibull_quantiles
from kronos_stream.forecast.summary import Summary, summarise_closes
from kronos_stream.market.timeframe import Timeframe


@dataclass(frozen=True, slots=True, eq=False)
class Fan:
    """Closes (paths, horizon), price units, at bars that open at ``times`` (horizon,), UTC ms.

    ``origin`` is the open of the last known bar, ``last`` its close, ``probs`` the probabilities to
    show, ascending.
    """

    series: str
    timeframe: Timeframe
    origin: int
    last: float
    times: NDArray[np.int64]
    closes: NDArray[np.float32]
    probs: tuple[float, ...]

    def quantiles(self, probs: tuple[float, ...] | None = None) -> NDArray[np.float64]:
        """Weibull quantiles of the close, (probs, horizon); by default, of the fan's ``probs``."""
        return weibull_quantiles(self.closes, self.probs if probs is None else probs)

    def summary(self) -> Summary:
        return summarise_closes(self.closes, self.last, self.probs)

    def columns(self) -> dict[str, list[float]]:
        """Mean and quantiles of the close, by name; one value per step."""
        mean = self.closes.mean(axis=0, dtype=np.float64)
        quantiles = zip(self.probs, self.quantiles(), strict=True)
        return {"mean": mean.tolist()} | {quantile_name(p): q.tolist() for p, q in quantiles}
