"""Baseline forecasts that use only the volatility of the history."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kronos_stream.channels import CLOSE
from kronos_stream.evaluation.cases import ForecastFunction, History

EWMA_DECAY = 0.94
"""Daily decay of RiskMetrics (J.P. Morgan 1996)."""


def random_walk(*, decay: float = 1.0, paths: int = 256, seed: int = 0) -> ForecastFunction:
    """A Gaussian random walk of the log close, with the history's volatility.

    ``decay`` below 1 weighs a return by decay^age, as RiskMetrics does. All four prices of a
    bar equal its close. ``paths`` may differ from the model's: fair scores do not depend on it.
    """

    def forecast(
        histories: Sequence[History], horizon: int, _paths: int
    ) -> list[NDArray[np.floating]]:
        rng = np.random.default_rng([seed, 11])
        return [
            _paths_of(h, rng.standard_normal((paths, horizon)), volatility(h.values, decay))
            for h in histories
        ]

    return forecast


def last_value(
    histories: Sequence[History], horizon: int, _paths: int
) -> list[NDArray[np.floating]]:
    """A forecast whose paths all stay at the last close."""
    return [_paths_of(h, np.zeros((2, horizon)), 0.0) for h in histories]


def volatility(values: NDArray[np.float64], decay: float = 1.0) -> float:
    """Root of the (weighted) mean squared log return of closes in ``values`` (L, 6)."""
    returns = np.diff(np.log(values[:, CLOSE]))
    weights = decay ** np.arange(len(returns))[::-1]
    return float(np.sqrt((weights * returns**2).sum() / weights.sum()))


def _paths_of(history: History, noise: NDArray[np.float64], sigma: float) -> NDArray[np.floating]:
    closes = history.values[-1, CLOSE] * np.exp(sigma * noise.cumsum(1))
    bars = np.zeros((*closes.shape, 6))
    bars[..., :4] = closes[..., None]
    bars[..., 4:] = history.values[:, 4:].mean(0)
    return bars
