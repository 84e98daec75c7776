"""bfloat16: forecasts differ less than between two seeds, and few tokens flip.

The tiny checkpoint's weights are random and its logits large (standard deviation about 6), so its
tokens depend on rounding more than those of a trained model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kronos_stream import Context, Forecaster
from kronos_stream.forecast.quantiles import weibull_quantiles
from kronos_stream.model import Predictor, Tokenizer

Walks = Callable[..., list[Context]]
Floats = NDArray[np.float64]

CONTEXTS, PATHS, HORIZON = 40, 64, 8
QUANTILES = [0.05, 0.25, 0.5, 0.75, 0.95]
CLOSE = 3

# Seen: 0.38, 1.00, 0.04 and 0.12.
SAME_NOISE = 0.7
OTHER_NOISE = 1.2
FLIPS = 0.1
DIFFERENT = 0.2


class ForecastSample(NamedTuple):
    """Forecasts of all contexts with one type and seed."""

    quantiles: Floats  # of the close, in standard deviations of the context's closes
    tokens: NDArray[np.int64]  # (contexts, paths, horizon, 2)


@pytest.fixture(scope="module")
def bfloat16(tiny_predictor: Predictor, tiny_tokenizer: Tokenizer) -> Forecaster:
    return Forecaster(
        tiny_predictor, tiny_tokenizer, device="cpu", dtype="bfloat16", max_context=128
    )


@pytest.fixture(scope="module")
def runs(
    tiny_forecaster: Forecaster, bfloat16: Forecaster, make_contexts: Walks
) -> dict[tuple[str, int], ForecastSample]:
    """Forecasts of forty contexts of 40 to 112 bars, in both types, with two seeds each."""
    lengths = np.random.default_rng(0).integers(40, 113, CONTEXTS).tolist()
    contexts = make_contexts(lengths, seed=50)
    spread = [np.std(np.asarray(context.values)[:, CLOSE]) for context in contexts]

    def run(forecaster: Forecaster, seed: int) -> ForecastSample:
        draws = forecaster.draw(contexts, HORIZON, PATHS, seed=seed)
        closes = [draw.paths[..., CLOSE] / std for draw, std in zip(draws, spread, strict=True)]
        quantiles = [weibull_quantiles(close, QUANTILES) for close in closes]
        return ForecastSample(np.stack(quantiles), np.stack([draw.tokens for draw in draws]))

    return {
        (name, seed): run(forecaster, seed)
        for name, forecaster in (("float32", tiny_forecaster), ("bfloat16", bfloat16))
        for seed in (0, 1)
    }


def distance(one: ForecastSample, other: ForecastSample) -> float:
    """Mean absolute difference over contexts, quantiles and steps."""
    return float(np.abs(one.quantiles - other.quantiles).mean())


def test_quantiles_agree_within_the_monte_carlo_error(
    runs: dict[tuple[str, int], ForecastSample],
) -> None:
    """With the same noise the types differ less than two seeds; with different noise as much."""
    seeds = distance(runs["float32", 0], runs["float32", 1])
    same = distance(runs["float32", 0], runs["bfloat16", 0]) / seeds
    other = distance(runs["float32", 0], runs["bfloat16", 1]) / seeds
    print(f"bf16 to fp32, by seed to seed: same noise {same:.2f}, other noise {other:.2f}")  # noqa: T201
    assert 0 < same < SAME_NOISE
    assert other < OTHER_NOISE


def test_token_flips(runs: dict[tuple[str, int], ForecastSample]) -> None:
    """With the same noise and history few steps give different tokens; few tokens differ in all."""
    differs = runs["float32", 0].tokens != runs["bfloat16", 0].tokens
    step = differs.any(-1)
    same_past = step.cumsum(axis=2) - step == 0
    flips, different = step[same_past].mean(), differs.mean()
    print(f"bf16 flips {flips:.3f} of steps after the same past; {different:.3f} of tokens differ")  # noqa: T201
    assert flips < FLIPS
    assert different < DIFFERENT
    # For the bounds to be meaningful, different noise must give mostly different tokens.
    assert (runs["float32", 0].tokens != runs["float32", 1].tokens).mean() > 0.5


def test_only_the_tokenizers_encoder_stays_in_float32(bfloat16: Forecaster) -> None:
    """The encoder's output is signs, so it is computed in float32; everything else is bfloat16."""
    tokenizer, predictor = bfloat16._runner._tokenizer, bfloat16._runner._predictor
    assert {block.qkv.dtype for block in tokenizer.encoder.blocks} == {torch.float32}
    assert tokenizer.code.dtype == torch.float32
    stacks = (*tokenizer.decoder.blocks, *predictor.stack.blocks)
    assert {block.qkv.dtype for block in stacks} == {torch.bfloat16}


def test_greedy_first_bars_agree(
    tiny_forecaster: Forecaster, bfloat16: Forecaster, make_contexts: Walks
) -> None:
    """Without noise, nine of ten contexts give the same first bar."""
    contexts = make_contexts([64] * CONTEXTS, seed=51)
    pairs = zip(
        tiny_forecaster.draw(contexts, 1, 1, top_k=1),
        bfloat16.draw(contexts, 1, 1, top_k=1),
        strict=True,
    )
    same = [np.array_equal(one.tokens, other.tokens) for one, other in pairs]
    assert np.mean(same) > 0.9
