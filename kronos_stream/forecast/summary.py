"""Summary of sample paths in a few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kronos_stream.channels import CLOSE
from kronos_stream.forecast.quantiles import quantile_name, required_paths, weibull_quantiles

_TAIL = 0.05
_DEVIATION_STEPS = 2


@dataclass(frozen=True, slots=True)
class Summary:
    """Final close relative to the last known one, over all paths. Returns are close/last - 1.

    ``None`` means undefined: all returns if last ≤ 0, ``volatility`` if the horizon is one bar or
    half of the paths reach a price ≤ 0, and quantiles (so also ``value_at_risk_95``) for which
    there are too few paths.
    """

    p_up: float
    """Share of paths whose final close is above last."""
    expected_return: float | None
    """Mean final return."""
    return_quantiles: dict[str, float | None]
    """Weibull quantiles of the final return, by name (``q05``)."""
    volatility: float | None
    """Median over paths of the standard deviation (ddof 0) of per-bar log returns."""
    value_at_risk_95: float | None
    """Minus the 5 % quantile of the final return: positive is a loss."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(paths: NDArray[np.floating], last: float, probs: Sequence[float]) -> Summary:
    """Summarise ``paths`` (paths, horizon, 6); ``last`` is the close of the origin bar."""
    return summarise_closes(paths[..., CLOSE], last, probs)


def summarise_closes(closes: NDArray[np.floating], last: float, probs: Sequence[float]) -> Summary:
    """Summarise closes (paths, horizon). Raises ValueError unless all are finite."""
    if not np.isfinite(closes).all():
        raise ValueError("paths hold NaN or infinite closes")
    final = closes[:, -1].astype(np.float64)
    returns = final / last - 1 if last > 0 else None
    known = _return_quantiles(returns, [*probs, _TAIL])
    tail = known[_TAIL]
    return Summary(
        p_up=float(np.mean(final > last)),
        expected_return=None if returns is None else float(returns.mean()),
        return_quantiles={quantile_name(p): known[p] for p in probs},
        volatility=_volatility(closes, last),
        value_at_risk_95=None if tail is None else -tail,
    )


def _return_quantiles(
    returns: NDArray[np.float64] | None, probs: Sequence[float]
) -> dict[float, float | None]:
    found: dict[float, float | None] = dict.fromkeys(probs)
    if returns is not None:
        supported = [p for p in probs if len(returns) >= required_paths(p)]
        found |= zip(supported, weibull_quantiles(returns, supported).tolist(), strict=True)
    return found


def _volatility(closes: NDArray[np.floating], last: float) -> float | None:
    if last <= 0 or closes.shape[1] < _DEVIATION_STEPS:
        return None
    # A path that reaches zero has no log returns; it counts as more volatile than all others.
    deviations = np.full(len(closes), np.inf)
    positive = (closes > 0).all(axis=1)
    known = closes[positive].astype(np.float64)
    prices = np.concatenate([np.full((len(known), 1), last), known], axis=1)
    deviations[positive] = np.diff(np.log(prices), axis=1).std(axis=1)
    median = float(np.median(deviations))
    return median if np.isfinite(median) else None
