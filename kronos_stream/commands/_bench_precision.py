"""Difference between bfloat16 and float32 forecasts, relative to that between two seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kronos_stream.channels import CLOSE
from kronos_stream.engine import Context, Forecaster, SampledPaths
from kronos_stream.forecast.quantiles import weibull_quantiles

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, slots=True)
class Precision:
    """Result of a comparison over many contexts."""

    contexts: int
    paths: int
    horizon: int
    flips: float
    """Share of tokens that differ although all earlier ones of their path agree."""
    paths_apart: float
    """Share of paths that differ anywhere."""
    same_noise: float
    """Mean distance between the types' quantiles on one seed, over that of two float32 seeds."""
    other_noise: float
    """As ``same_noise``, with bfloat16 on the other seed: about 1 if the types agree."""


def compare_precision(
    model: str, contexts: Sequence[Context], *, horizon: int, paths: int, device: str
) -> Precision:
    """Sample the same contexts in both types, from two seeds each."""
    draws: dict[tuple[str, int], list[SampledPaths]] = {}
    for dtype in ("float32", "bfloat16"):
        forecaster = Forecaster.from_pretrained(model, device=device, dtype=dtype)
        for seed in (0, 1):
            draws[dtype, seed] = forecaster.draw(contexts, horizon, paths, seed=seed)
    spread = [np.asarray(context.values)[:, CLOSE].std() for context in contexts]
    quantiles = {
        run: np.stack(
            [
                weibull_quantiles(draw.paths[..., CLOSE] / scale, _QUANTILES)
                for draw, scale in zip(drawn, spread, strict=True)
            ]
        )
        for run, drawn in draws.items()
    }

    def distance(first: tuple[str, int], second: tuple[str, int]) -> float:
        return float(np.abs(quantiles[first] - quantiles[second]).mean())

    exact, fast = ("float32", 0), ("bfloat16", 0)
    seeds = distance(exact, ("float32", 1))
    tokens = [np.stack([draw.tokens for draw in draws[run]]) for run in (exact, fast)]
    return Precision(
        contexts=len(contexts),
        paths=paths,
        horizon=horizon,
        flips=_flip_rate(tokens[0], tokens[1]),
        paths_apart=float((tokens[0] != tokens[1]).any((-2, -1)).mean()),
        same_noise=distance(exact, fast) / seeds,
        other_noise=distance(exact, ("bfloat16", 1)) / seeds,
    )


def _flip_rate(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Share of tokens (..., horizon, 2), in sampling order, that differ after equal history."""
    differ = (first != second).reshape(-1, first.shape[-2] * first.shape[-1])
    equal_before = np.cumsum(differ, axis=1) == differ
    return float((differ & equal_before).sum() / equal_before.sum())
