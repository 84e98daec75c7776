"""Scale the prices of a series that moves less than the model can resolve.

The model adds :data:`~kronos_stream.channels.STD_FLOOR` to each standard deviation; for a price
such as 0.00001 that constant would hide every movement.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kronos_stream.channels import AMOUNT, CLOSE, VOLUME

_SMALL_SPREAD = 1e-3
"""Standard deviation of the closes below which prices are scaled."""

_ULP = 2.0**-24
"""Half the relative distance of float32 neighbours: the least deviation of a flat price."""

_MAX_TURNOVER = 2.0**56
"""Bound of the scaled turnover: the normalisation sums its squares in float32."""


def price_scale(values: NDArray[np.float32]) -> float:
    """Return the power of two that prices are multiplied by before the model sees them; mostly 1.

    values: (L, 5 | 6) as of a context. The standard deviation of the scaled closes is between 1
    and 2, unless the turnover would then exceed float32. Powers of two lose no bit.
    """
    closes = values[:, CLOSE].astype(np.float64)
    spread = max(float(closes.std()), abs(float(closes[-1])) * _ULP)
    if not 0 < spread < _SMALL_SPREAD:
        return 1.0
    if values.shape[1] > AMOUNT:
        turnover = float(values[:, AMOUNT].max())
    else:
        turnover = float((values[:, VOLUME].astype(np.float64) * closes).max())
    exponent = -math.floor(math.log2(spread))
    if turnover > 0:
        exponent = min(exponent, math.floor(math.log2(_MAX_TURNOVER / turnover)))
    return 2.0 ** max(exponent, 0)


def scale_prices(values: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """Multiply prices and amounts of ``values`` (…, 5 | 6) by ``scale``; volumes stay."""
    if scale == 1:
        return values
    factors = np.full(values.shape[-1], scale, np.float32)
    factors[VOLUME] = 1
    return values * factors
