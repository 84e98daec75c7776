"""Quantiles of sample paths by Weibull positions.

With m paths the i-th smallest stands at probability i/(m+1), so an outcome drawn from the same
distribution falls below it exactly that often. The usual sample quantiles are too narrow: their
bands cover (m-1)/(m+1) of what they claim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def weibull_quantiles(
    samples: ArrayLike, probs: Sequence[float], axis: int = 0
) -> NDArray[np.float64]:
    """Quantiles of ``samples`` along ``axis``: (len(probs), …the other axes), same units.

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
    """The fewest samples whose Weibull positions reach ``p``; ValueError unless 0 < p < 1."""
    if not 0 < p < 1:
        raise ValueError(f"quantile {p:g} is not between 0 and 1")
    odds = max((1 - p) / p, p / (1 - p))
    if math.isinf(odds):
        raise ValueError(f"quantile {p:g} is too close to 0")
    return max(1, math.ceil(odds * (1 - 1e-9)))  # 0.9 / (1 - 0.9) is a shade over 9


def quantile_name(p: float) -> str:
    """The field name of a quantile: 0.05 → ``q05``, 0.5 → ``q50``, 0.975 → ``q97.5``."""
    whole, _, fraction = f"{100 * p:.10g}".partition(".")
    return f"q{whole:>02}" + (f".{fraction}" if fraction else "")
