"""The cached engine gives the same tokens as an uncached recompute on the modules.

Both are float32 and round differently, and a uniform number can fall within that rounding of the
boundary between two tokens. Where a path differs, its first difference must be proven to be such a
tie: shown from the recomputed probabilities, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kronos_stream import Context, Forecaster
from kronos_stream.engine import SampledPaths
from kronos_stream.engine.context import PreparedContext, prepare
from kronos_stream.engine.noise import noise_key, uniforms
from kronos_stream.engine.sampling import Sampling
from kronos_stream.engine.uncached import generate
from kronos_stream.model import Predictor, Tokenizer
from kronos_stream.model.inputs import denormalise

TIE = 2e-4
"""Probability distance within which rounding may decide."""
TIED_PATHS = 0.01
"""Permitted share of paths with a tie: ten times the share seen with this checkpoint."""
RELATIVE = 1e-4

TEMPERATURES = st.floats(0.5, 1.5) | st.lists(st.floats(0.5, 1.5), min_size=1, max_size=4)


def noise(item: PreparedContext, paths: int, seed: int) -> Tensor:
    """The uniform numbers of one context, (H, 2, 1, P)."""
    key = torch.tensor([noise_key(seed, item.name, item.origin)])
    return uniforms(key, 0, paths, item.horizon)


def recompute(
    models: tuple[Predictor, Tokenizer], item: PreparedContext, uniform: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Normalised candles (P, H, 6) and tokens (P, H, 2) without any cache."""
    candles, stamps = torch.from_numpy(item.normalised)[None], torch.from_numpy(item.stamps)[None]
    out, tokens = generate(*models, candles, stamps, uniform, max_context=128, sampling=sampling)
    return out[0], tokens[0]


def logits_after(
    models: tuple[Predictor, Tokenizer], item: PreparedContext, drawn: Tensor, s1: int
) -> tuple[Tensor, Tensor]:
    """Both levels' logits of the bar after the context and the ``drawn`` tokens (h, 2)."""
    predictor, tokenizer = models
    with torch.inference_mode():
        past = torch.stack(tokenizer.tokenise(torch.from_numpy(item.normalised)[None]), -1)[0]
        tokens = torch.cat((past, drawn))[None]
        stamps = torch.from_numpy(item.stamps)[None, : tokens.shape[1]]
        hidden = predictor.hidden(tokens[..., 0], tokens[..., 1], stamps)
        s2 = predictor.s2_logits_last(hidden, torch.tensor([s1]))
        return predictor.s1_logits(hidden[0, -1]), s2[0]


def is_tie(logits: Tensor, uniform: float, pair: tuple[int, int], s: Sampling, step: int) -> bool:
    """Return whether rounding decides between two tokens, at the filter or at a CDF boundary."""
    p = torch.softmax(logits.double() / s.temperature_at(step), -1).numpy()
    order = np.argsort(-p)
    top_k = min(s.top_k or len(p), len(p))
    if top_k < len(p) and p[order[top_k - 1]] - p[order[top_k]] < TIE * p[order[top_k]]:
        return True
    kept = order[:top_k]
    before = np.concatenate(([0.0], p[kept].cumsum()[:-1])) / p[kept].sum()
    if s.top_p < 1 and np.abs(before - s.top_p).min() < TIE:
        return True
    inside = np.zeros_like(p)
    inside[kept[before <= s.top_p]] = p[kept[before <= s.top_p]]
    cdf = inside.cumsum() / inside.sum()
    low, high = sorted(pair)
    return bool(abs(uniform - cdf[low]) < TIE and cdf[high - 1] - cdf[low] < TIE)


def check_paths(
    models: tuple[Predictor, Tokenizer],
    item: PreparedContext,
    draw: SampledPaths,
    sampling: Sampling,
    seed: int,
) -> int:
    """Compare one context's paths with the recompute; return the number of paths with a tie."""
    count = len(draw.tokens)
    uniform = noise(item, count, seed)
    candles, tokens = recompute(models, item, uniform, sampling)
    wanted = denormalise(candles.numpy(), item.mean, item.std)
    cached, plain = torch.from_numpy(draw.tokens), tokens
    ties = 0
    for path in range(count):
        differs = (cached[path] != plain[path]).flatten().nonzero()
        if not len(differs):
            off = np.abs(draw.paths[path] - wanted[path])
            assert (off <= RELATIVE * np.maximum(np.abs(wanted[path]), item.std)).all()
            continue
        step, level = divmod(int(differs[0]), 2)
        both = logits_after(models, item, plain[path, :step], int(plain[path, step, 0]))
        pair = int(cached[path, step, level]), int(plain[path, step, level])
        at = float(uniform[step, level, 0, path])
        assert sampling.top_k != 1, f"greedy tokens differ: {pair} at step {step}"
        assert is_tie(both[level], at, pair, sampling, step), f"{pair} at step {step} is no tie"
        ties += 1
    return ties


def test_random_calls_give_equal_tokens(
    tiny_forecaster: Forecaster,
    tiny_predictor: Predictor,
    tiny_tokenizer: Tokenizer,
    make_contexts: Callable[..., list[Context]],
) -> None:
    """Tokens are equal for all lengths, horizons, batches, paths, temperatures, top-k and top-p."""
    models = tiny_predictor, tiny_tokenizer
    counted = {"paths": 0, "ties": 0}
    sizes = st.tuples(st.integers(2, 112), st.integers(1, 16))

    @settings(max_examples=40, deadline=None, database=None)
    @given(
        contexts=st.lists(sizes, min_size=1, max_size=4),
        paths=st.integers(1, 9),
        temperature=TEMPERATURES,
        top_k=st.sampled_from([0, 1, 2, 5, 20, 64, 100]),
        top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 1e-6]),
        seed=st.integers(-(2**40), 2**62),
    )
    def check(
        contexts: list[tuple[int, int]],
        paths: int,
        temperature: float | list[float],
        top_k: int,
        top_p: float,
        seed: int,
    ) -> None:
        lengths, horizons = zip(*contexts, strict=True)
        walked = make_contexts(lengths, seed=abs(seed))
        draws = tiny_forecaster.draw(
            walked, horizons, paths, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
        spread = tuple(temperature) if isinstance(temperature, list) else temperature
        sampling = Sampling(spread, top_k, top_p)
        for i, (context, horizon, draw) in enumerate(zip(walked, horizons, draws, strict=True)):
            assert draw.paths.shape == (paths, horizon, 6)
            assert draw.tokens.shape == (paths, horizon, 2)
            item = prepare(context, i, horizon)
            counted["ties"] += check_paths(models, item, draw, sampling, seed)
            counted["paths"] += paths

    check()
    assert counted["paths"] >= 40
    assert counted["ties"] <= TIED_PATHS * counted["paths"], counted


def test_full_windows_give_equal_tokens(
    tiny_forecaster: Forecaster,
    tiny_predictor: Predictor,
    tiny_tokenizer: Tokenizer,
    make_contexts: Callable[..., list[Context]],
) -> None:
    """The horizon's last bar may be the window's last, and the context may be two bars."""
    models = tiny_predictor, tiny_tokenizer
    contexts, horizons = make_contexts([127, 96, 2], seed=9), [1, 32, 126]
    draws = tiny_forecaster.draw(contexts, horizons, 2, top_k=1)
    for i, (context, draw) in enumerate(zip(contexts, draws, strict=True)):
        check_paths(models, prepare(context, i, horizons[i]), draw, Sampling(top_k=1), 0)


def test_the_tie_rule_detects_a_wrong_token() -> None:
    """The rule accepts only a uniform number at a boundary."""
    logits = torch.log(torch.tensor([0.2, 0.3, 0.1, 0.4]))
    plain = Sampling()
    assert is_tie(logits, 0.5, (1, 2), plain, 0)
    assert is_tie(logits, 0.5 + TIE / 2, (2, 1), plain, 0)
    assert not is_tie(logits, 0.5, (1, 3), plain, 0)
    assert not is_tie(logits, 0.5 + 2 * TIE, (1, 2), plain, 0)
    # Of 0.4, 0.3, 0.2, 0.1 the first two sum to 0.7: rounding decides whether the third is kept.
    assert is_tie(logits, 0.9, (0, 3), Sampling(top_p=0.7), 0)
    assert not is_tie(logits, 0.9, (0, 3), Sampling(top_p=0.75), 0)
    assert is_tie(torch.zeros(4), 0.9, (0, 3), Sampling(top_k=2), 0)
