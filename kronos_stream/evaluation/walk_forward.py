"""Walk-forward evaluation of a forecast against baselines, with intervals.

Figures are of log(close / close of the origin bar), in units of the history's volatility, so that
calm and volatile markets have equal weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kronos_stream.channels import CLOSE
from kronos_stream.evaluation.baselines import EWMA_DECAY, last_value, random_walk, volatility
from kronos_stream.evaluation.cases import Case, ForecastFunction
from kronos_stream.evaluation.scoring import (
    Interval,
    block_bootstrap,
    covered,
    fair_crps,
    path_volatility,
)
from kronos_stream.forecast.quantiles import required_paths

LEVELS = (0.5, 0.8, 0.9)
_BATCH = 256
"""Cases per call of a forecast."""


@dataclass(slots=True)
class Scores:
    """Figures of one forecast, by case."""

    crps: list[NDArray[np.float64]] = field(default_factory=list)  # (H,) each
    inside: dict[float, list[NDArray[np.bool_]]] = field(default_factory=dict)  # (H,) each
    volatility_error: list[float] = field(default_factory=list)

    def add(self, paths: NDArray[np.floating], case: Case, sigma: float) -> None:
        """Score ``paths`` (m, H, 6) in units of ``sigma``."""
        last = case.history.values[-1, CLOSE]
        sampled = np.log(np.maximum(paths[..., CLOSE].astype(np.float64), last * 1e-6) / last)
        actual = np.log(case.future[:, CLOSE] / last)
        self.crps.append(fair_crps(sampled / sigma, actual / sigma))
        for level in LEVELS:
            if len(sampled) >= required_paths((1 - level) / 2):
                self.inside.setdefault(level, []).append(covered(sampled, actual, level))
        expected = float(np.median(path_volatility(sampled)))
        self.volatility_error.append(abs(expected - float(path_volatility(actual))) / sigma)


@dataclass(frozen=True, slots=True)
class Report:
    """Result of an evaluation; ``model`` is the name of the evaluated forecast."""

    model: str
    cases: int
    blocks: int
    horizon: int
    crps: dict[str, float]
    """Mean fair CRPS over all steps, by forecast, in units of historical volatility."""
    crps_ratio: dict[str, Interval]
    """The model's CRPS over that of each other forecast, over all steps: below 1 it is better."""
    crps_ratio_by_step: dict[str, list[Interval]]
    coverage: dict[str, Interval]
    """Share of outcomes inside the model's bands, by probability of the band."""
    volatility_mae: dict[str, float]
    """Mean absolute error of the standard deviation of one-bar log returns, in the same units."""
    volatility_ratio: dict[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        """Figures for JSON; intervals as [value, low, high]."""

        def plain(value: Any) -> Any:  # noqa: ANN401
            if isinstance(value, Interval):
                return [value.value, value.low, value.high]
            if isinstance(value, dict):
                return {str(k): plain(v) for k, v in value.items()}
            return [plain(v) for v in value] if isinstance(value, list) else value

        return {name: plain(getattr(self, name)) for name in self.__slots__}


def evaluate(
    cases: Iterable[Case],
    forecast: ForecastFunction,
    *,
    paths: int = 32,
    model: str = "model",
    others: Mapping[str, ForecastFunction] | None = None,
    seed: int = 0,
) -> Report:
    """Score ``forecast`` and its baselines on ``cases``, which share one horizon.

    Cases with a constant history are omitted, because their unit would be 0. ``others`` are
    further forecasts for comparison. Raises ValueError if no case is left.
    """
    forecasts: dict[str, ForecastFunction] = {
        model: forecast,
        "random walk": random_walk(seed=seed),
        "random walk, EWMA": random_walk(decay=EWMA_DECAY, seed=seed),
        "last value": last_value,
        **(others or {}),
    }
    scores = {name: Scores() for name in forecasts}
    blocks: list[int] = []
    for batch in _batches(cases):
        horizon = len(batch[0].future)
        blocks.extend(case.block for case in batch)
        units = [volatility(case.history.values) for case in batch]
        histories = [case.history for case in batch]
        for name, function in forecasts.items():
            sampled = function(histories, horizon, paths)
            for case, sample, unit in zip(batch, sampled, units, strict=True):
                scores[name].add(sample, case, unit)
        for case, unit in zip(batch, units, strict=True):
            if case.truth is not None:
                scores.setdefault("truth", Scores()).add(case.truth, case, unit)
    if not blocks:
        raise ValueError(
            "nothing to evaluate: no stretch without gaps has enough bars for lookback and horizon"
        )
    return _report(model, scores, np.array(blocks), seed)


def _batches(cases: Iterable[Case]) -> Iterable[list[Case]]:
    batch: list[Case] = []
    for case in cases:
        if volatility(case.history.values) > 0:
            batch.append(case)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _report(model: str, scores: dict[str, Scores], blocks: NDArray[np.int64], seed: int) -> Report:
    crps = {name: np.array(s.crps) for name, s in scores.items()}  # (n, H)
    n, horizon = crps[model].shape
    names = [name for name in scores if name != model]
    errors = {name: np.array(s.volatility_error) for name, s in scores.items()}

    def ratios(figures: dict[str, NDArray[np.float64]]) -> dict[str, Interval]:
        parts = [figures[model], *(figures[name] for name in names)]
        return dict(zip(names, block_bootstrap(parts, blocks, seed=seed), strict=True))

    by_step = [ratios({k: v[:, h] for k, v in crps.items()}) for h in range(horizon)]
    coverage = {
        f"{level:.0%}": block_bootstrap([np.array(inside).mean(1), np.ones(n)], blocks, seed=seed)[
            0
        ]
        for level, inside in scores[model].inside.items()
    }
    return Report(
        model=model,
        cases=n,
        blocks=len(np.unique(blocks)),
        horizon=horizon,
        crps={name: float(v.mean()) for name, v in crps.items()},
        crps_ratio=ratios({k: v.mean(1) for k, v in crps.items()}),
        crps_ratio_by_step={name: [step[name] for step in by_step] for name in names},
        coverage=coverage,
        volatility_mae={name: float(v.mean()) for name, v in errors.items()},
        volatility_ratio=ratios(errors),
    )
