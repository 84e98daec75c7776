"""Scores of sample paths against outcomes: CRPS, coverage, volatility, and their intervals.

Shapes: samples (m, ...), outcomes (...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kronos_stream.forecast.quantiles import weibull_quantiles

Floats = NDArray[np.float64]


def fair_crps(samples: Floats, outcome: Floats) -> Floats:
    """Continuous ranked probability score of ``samples`` (m, ...) for ``outcome`` (...), m >= 2.

    The fair estimator (Ferro 2014): its mean does not depend on the number of samples, whereas
    that of the plain estimator is too high, by 3 % with 32 samples. In units of the outcome;
    lower is better; NaN in either gives NaN.
    """
    m = len(samples)
    if m < 2:
        raise ValueError("fair CRPS needs two samples or more")
    error = np.abs(samples - outcome).mean(0)
    # Mean distance of two different samples, from the sorted ones: O(m log m).
    rank = (2 * np.arange(1, m + 1) - m - 1).reshape(-1, *[1] * (samples.ndim - 1))
    spread: Floats = (rank * np.sort(samples, axis=0)).sum(0) * (2 / (m * (m - 1)))
    result: Floats = error - spread / 2
    return result


def covered(samples: Floats, outcome: Floats, level: float) -> NDArray[np.bool_]:
    """True where ``outcome`` (...) lies in the central band of probability ``level``."""
    tail = (1 - level) / 2
    low, high = weibull_quantiles(samples, [tail, 1 - tail])
    inside: NDArray[np.bool_] = (low <= outcome) & (outcome <= high)
    return inside


def path_volatility(log_prices: Floats) -> Floats:
    """Standard deviation (ddof 0) of one-bar log returns along the last axis.

    ``log_prices`` (..., H) are logarithms of close / close of the origin bar.
    """
    first = np.zeros((*log_prices.shape[:-1], 1))
    result: Floats = np.diff(np.concatenate((first, log_prices), axis=-1), axis=-1).std(-1)
    return result


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def block_bootstrap(
    parts: Sequence[Floats], blocks: NDArray[np.int64], *, resamples: int = 1000, seed: int = 0
) -> list[Interval]:
    """Ratios of sums, the first of ``parts`` over each of the others, with 95 % intervals.

    ``parts`` are arrays (n,) of one figure per forecast. ``blocks`` (n,) numbers groups of
    forecasts, such as all of one market in one week. Whole blocks are resampled, because errors
    of forecasts of the same time are correlated. Percentile intervals.
    """
    _, index = np.unique(blocks, return_inverse=True)
    sums = np.stack([np.bincount(index, weights=part) for part in parts])  # (parts, blocks)
    count = sums.shape[1]
    rng = np.random.default_rng([seed, 95])
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)  # (resamples, blocks)
    totals = sums @ drawn.T  # (parts, resamples)
    intervals = []
    for i in range(1, len(parts)):
        low, high = np.quantile(totals[0] / totals[i], [0.025, 0.975])
        intervals.append(Interval(float(sums[0].sum() / sums[i].sum()), float(low), float(high)))
    return intervals
