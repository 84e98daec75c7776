"""Quantiles of sample paths by Weibull positions.

Of m paths, the i-th smallest is the quantile of probability i/(m+1): an outcome from the same
distribution is below it with exactly that probability. The usual sample quantiles are too narrow:
the coverage of their bands is (m-1)/(m+1) of the nominal one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def weibull_quantiles(
    samples: ArrayLike, probs: Sequence[float], axis: int = 0
) -> NDArray[np.float64]:
    """Quantiles of ``samples`` along ``axis``: (len(probs), the other axes…), same units.

    Position p·(m+1) among the m sorted samples, linear between neighbours; NaN gives NaN.
    Raises ValueError for probabilities that m samples cannot support.
    """
    array = np.asarray(samples, np.float64)
    check_supported(probs, array.shape[axis])
    return np.asarray(np.quantile(array, probs, axis=axis, method="weibull"), np.float64)


def check_supported(probs: Sequence[float], paths: int) -> None:
    """Raise ValueError, naming the paths needed, unless ``paths`` samples support ``probs``."""
    for p in probs:
        needed = required_paths(p)
        if paths < needed:
            raise ValueError(
                f"quantile {p:g} needs at least {needed} paths, not {paths}: with m paths, "
                "quantiles reach from 1/(m+1) to m/(m+1)"
            )


def required_paths(p: float) -> int:
    """Smallest number of samples whose Weibull positions reach ``p``.

    Raises ValueError unless 0 < p < 1.
    """
    if not 0 < p < 1:
        raise ValueError(f"quantile {p:g} is not between 0 and 1")
    odds = max((1 - p) / p, p / (1 - p))
    if math.isinf(odds):
        raise ValueError(f"quantile {p:g} is too close to 0")
    return max(1, math.ceil(odds * (1 - 1e-9)))  # 0.9 / (1 - 0.9) is slightly more than 9


def quantile_name(p: float) -> str:
    """The field name of a quantile: 0.05 → ``q05``, 0.5 → ``q50``, 0.975 → ``q97.5``."""
    whole, _, fraction = f"{100 * p:.10g}".partition(".")
    return f"q{whole:>02}" + (f".{fraction}" if fraction else "")
