"""Sampling: tokens follow exactly the filtered distribution."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kronos_stream import Context, Forecaster
from kronos_stream.engine.context import prepare
from kronos_stream.engine.sampling import MIN_TEMPERATURE, Sampling, draw, filtered
from kronos_stream.model import Predictor, Tokenizer

Floats = NDArray[np.float64]

DRAWS = 60_000
SURE = 1e-4
"""A correct sampler is below this p-value for one in 10,000 seeds; the seed is fixed."""
SETTINGS = [(1.0, 0, 1.0), (1.5, 12, 1.0), (2.0, 0, 0.9), (2.0, 24, 0.85)]


def plain_filter(logits: Floats, temperature: float, top_k: int, top_p: float) -> Floats:
    """Probabilities after temperature, top-k, then top-p, written for reading; ties stay."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    likeliest = np.sort(p)[::-1][: top_k or None]
    mass, kept = 0.0, []
    for share in likeliest / likeliest.sum():
        if mass > top_p:
            break
        mass += share
        kept.append(share)
    least = likeliest[len(kept) - 1]
    p[p < least] = 0
    out: Floats = p / p.sum()
    return out


def near_the_edge(logits: Floats, temperature: float, top_k: int, top_p: float) -> bool:
    """Return whether float32 may keep a different set of tokens: a sum is very close to top_p."""
    p = np.exp((logits - logits.max()) / temperature)
    likeliest = np.sort(p)[::-1][: top_k or None]
    return bool(np.abs(likeliest.cumsum() / likeliest.sum() - top_p).min() < 1e-5)


def chi_square_p(counts: NDArray[np.int64], probabilities: Floats) -> float:
    """P-value of counts; tokens expected fewer than 5 times are pooled. 0 for the impossible."""
    if counts[probabilities == 0].any():
        return 0.0
    expected = probabilities * counts.sum()
    rare = expected < 5
    pooled = np.append(expected[~rare], expected[rare].sum())
    seen = np.append(counts[~rare], counts[rare].sum())
    seen, pooled = seen[pooled > 0], pooled[pooled > 0]
    if len(pooled) == 1:
        return 1.0
    statistic = ((seen - pooled) ** 2 / pooled).sum()
    half = torch.tensor([(len(pooled) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def test_the_chi_square_check_detects_a_small_bias() -> None:
    """Check of the check: a textbook value, and a sampler that is 2 % off is detected."""
    # Chi-square 3.841 with one degree of freedom has p = 0.05.
    off = round(50 + (3.841 * 25) ** 0.5)
    assert chi_square_p(np.array([off, 100 - off]), np.full(2, 0.5)) == pytest.approx(
        0.05, abs=0.01
    )
    p = np.full(4, 0.25)
    assert chi_square_p(np.array([15_000] * 4), p) == pytest.approx(1)
    assert chi_square_p(np.array([15_600, 14_400, 15_600, 14_400]), p) < SURE
    assert chi_square_p(np.array([1, 59_999]), np.array([0.0, 1.0])) == 0


class FirstStep(NamedTuple):
    """Tokens drawn for the first bar, and the exact distributions they should follow."""

    s1: NDArray[np.int64]
    s2: NDArray[np.int64]
    p1: Floats  # (V1,)
    p2: Floats  # (V1, V2), given s1


@pytest.fixture(scope="module")
def predictor(tiny_predictor: Predictor) -> Predictor:
    """The tiny predictor with a strong dependency of s2 on s1, which random weights hardly have."""
    changed = deepcopy(tiny_predictor)
    with torch.no_grad():
        changed.dep_layer.cross_attn.q_proj.weight.mul_(20)
        changed.dep_layer.cross_attn.out_proj.weight.mul_(20)
    return changed


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda s: "T{}-k{}-p{}".format(*s))
def first_step(
    request: pytest.FixtureRequest,
    predictor: Predictor,
    tiny_tokenizer: Tokenizer,
    make_contexts: Callable[..., list[Context]],
) -> FirstStep:
    """60,000 paths of one bar."""
    temperature, top_k, top_p = request.param
    context = make_contexts([40] * 5)[4]
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    engine = Forecaster(predictor, tiny_tokenizer, device="cpu", dtype="float32", max_context=128)
    (drawn,) = engine.draw([context], 1, DRAWS, seed=11, **options)
    item = prepare(context, 0, 1)
    with torch.no_grad():
        s1, s2 = tiny_tokenizer.tokenise(torch.from_numpy(item.normalised)[None])
        hidden = predictor.hidden(s1, s2, torch.from_numpy(item.stamps)[None, :40])
        s1_logits = predictor.s1_logits(hidden[0, -1]).double().numpy()
        every = torch.arange(64)
        s2_logits = predictor.s2_logits_last(hidden.expand(64, -1, -1), every)
    p2 = [plain_filter(row, *request.param) for row in s2_logits.double().numpy()]
    tokens = drawn.tokens[:, 0]
    return FirstStep(
        tokens[:, 0], tokens[:, 1], plain_filter(s1_logits, *request.param), np.stack(p2)
    )


def count(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.bincount(tokens, minlength=64)


def test_s1_frequencies(first_step: FirstStep) -> None:
    """s1 follows its filtered probabilities, over at least five tokens."""
    assert (first_step.p1 * DRAWS >= 5).sum() >= 5
    assert chi_square_p(count(first_step.s1), first_step.p1) > SURE


def test_s2_frequencies(first_step: FirstStep) -> None:
    """s2 follows its filtered probabilities averaged over s1."""
    assert chi_square_p(count(first_step.s2), first_step.p1 @ first_step.p2) > SURE


def test_s2_given_s1(first_step: FirstStep) -> None:
    """Given the most frequent s1, s2 follows the probabilities conditioned on it."""
    s1 = int(count(first_step.s1).argmax())
    given_s1 = first_step.s2[first_step.s1 == s1]
    assert len(given_s1) > DRAWS / 20
    assert chi_square_p(count(given_s1), first_step.p2[s1]) > SURE
    # The average over s1 does not fit: the check would detect a wrong condition.
    others = first_step.p1 @ first_step.p2
    assert chi_square_p(count(given_s1), others / others.sum()) < SURE


@given(
    logits=st.lists(st.integers(-80, 80), min_size=1, max_size=24),
    temperature=st.sampled_from([0.05, 0.5, 1.0, 1.7, 30.0]),
    top_k=st.integers(0, 30),
    top_p=st.floats(0.01, 1.0),
)
def test_filters_equal_the_plain_implementation(
    logits: list[int], temperature: float, top_k: int, top_p: float
) -> None:
    """Temperature, top-k and top-p equal a plain implementation, including ties."""
    exact = np.array(logits) / 8
    assume(top_p == 1.0 or not near_the_edge(exact, temperature, top_k, top_p))
    got = filtered(torch.tensor([exact.tolist()]), Sampling(temperature, top_k, top_p), 0)[0]
    wanted = plain_filter(exact, temperature, top_k, top_p)
    np.testing.assert_allclose(got / got.sum(), wanted, rtol=0, atol=1e-5)
    assert (got[torch.from_numpy(wanted == 0)] < 1e-30).all()


def test_ties_stay_together() -> None:
    """Tokens as likely as the last one kept are kept too, as in the reference's top-k."""
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    for options in (Sampling(top_k=2), Sampling(top_p=0.6), Sampling(top_k=3, top_p=0.6)):
        assert (filtered(logits, options, 0)[0] > 0).tolist() == [True, True, True, False]


@given(st.integers(0, 2**31))
def test_a_single_kept_token_is_the_likeliest(seed: int) -> None:
    """A tiny top_p, top_k=1 and a tiny temperature give the maximum for any noise."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 50, generator=generator)
    top = logits.topk(2).values
    assume((top[:, 0] - top[:, 1]).min() > 0.03)
    noise = torch.rand(3, generator=generator).clamp(2**-24, 1 - 2**-24)
    for options in (Sampling(top_p=1e-9), Sampling(top_k=1), Sampling(MIN_TEMPERATURE)):
        assert torch.equal(draw(logits, noise, options, 0), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [MIN_TEMPERATURE, 1e-2, 1e6, 1e30])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_extreme_temperatures_are_finite(temperature: float, top_p: float) -> None:
    """No overflow, no empty distribution with huge logits; a high temperature is uniform."""
    logits = torch.tensor([[300.0, -300.0, 299.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    p = filtered(logits, Sampling(temperature, top_p=top_p), 0)
    assert torch.isfinite(p).all()
    assert (p.sum(-1) > 0).all()
    if temperature >= 1e6:
        assert torch.allclose(p[p > 0], torch.tensor(0.25), atol=1e-3)
    for uniform in (2.0**-24, 0.5, 1 - 2.0**-24):
        tokens = draw(logits, torch.full((2,), uniform), Sampling(temperature, top_p=top_p), 0)
        assert (p.gather(1, tokens[:, None]) > 0).all()


@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40), st.data())
def test_filtered_tokens_are_never_sampled(logits: list[float], data: st.DataObject) -> None:
    """The least and the greatest uniform number also give a kept token."""
    options = Sampling(1.0, data.draw(st.integers(0, 40)), data.draw(st.floats(0.01, 1)))
    row = torch.tensor([logits])
    p = filtered(row, options, 0)[0]
    for uniform in (2.0**-24, 1 - 2.0**-24):
        assert p[draw(row, torch.tensor([uniform]), options, 0)] > 0


def test_a_temperature_per_step() -> None:
    """Each step has its own; the last one holds for later steps."""
    options = Sampling((0.5, 1.0, 2.0))
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    for step, temperature in enumerate((0.5, 1.0, 2.0, 2.0, 2.0)):
        wanted = filtered(logits, Sampling(temperature), 0)
        assert torch.equal(filtered(logits, options, step), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"temperature": -1.0}, "for greedy sampling use top_k=1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"temperature": []}, "temperature"),
        ({"temperature": [1.0, 0.0]}, "temperature"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.01}, "top_p 1.01"),
        ({"top_p": float("nan")}, "top_p nan"),
        ({"paths": 0}, "paths 0"),
        ({"first_path": -1}, "first_path -1"),
        ({"horizon": 0}, "horizon 0"),
        ({"horizon": [1, 2]}, "2 horizons for 1 contexts"),
    ],
)
def test_invalid_options_are_rejected(
    tiny_forecaster: Forecaster,
    make_contexts: Callable[..., list[Context]],
    options: dict[str, float],
    message: str,
) -> None:
    """Options out of range are rejected with a message that quotes them."""
    arguments = {"horizon": 2, "paths": 2} | options
    with pytest.raises(ValueError, match=message):
        tiny_forecaster.sample(make_contexts([9]), **arguments)  # type: ignore[arg-type]


def test_counts_must_be_whole_numbers(
    tiny_forecaster: Forecaster, make_contexts: Callable[..., list[Context]]
) -> None:
    """numpy integers are accepted; a fraction is rejected, not truncated."""
    contexts = make_contexts([30])
    one: Any = np.int64(1)
    two: Any = np.int64(2)
    (got,) = tiny_forecaster.sample(contexts, [two], two, top_k=two, first_path=one, seed=one)
    (wanted,) = tiny_forecaster.sample(contexts, [2], 2, top_k=2, first_path=1, seed=1)
    np.testing.assert_array_equal(got, wanted)
    for wrong in ({"horizon": [2.9]}, {"paths": 2.5}, {"top_k": 1.5}, {"seed": 1.0}):
        options: dict[str, Any] = {"horizon": 2, "paths": 2} | wrong
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            tiny_forecaster.sample(contexts, **options)
