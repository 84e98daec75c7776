"""Weibull quantiles and the summary, compared with their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronos_stream.forecast.quantiles import (
    check_supported,
    quantile_name,
    required_paths,
    weibull_quantiles,
)
from kronos_stream.forecast.summary import summarise, summarise_closes

_SAMPLES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)


@given(_SAMPLES)
def test_ith_of_m_samples_is_the_quantile_of_i_over_m_plus_1(samples: list[float]) -> None:
    m = len(samples)
    probs = [i / (m + 1) for i in range(1, m + 1)]
    assert np.allclose(weibull_quantiles(samples, probs), sorted(samples), rtol=0, atol=1e-6)


@given(_SAMPLES, st.floats(0, 1))
def test_quantiles_between_samples_are_linear(samples: list[float], where: float) -> None:
    m = len(samples)
    position = 1 + where * (m - 1)
    low = min(int(position), m)
    ordered = [*sorted(samples), max(samples)]
    expected = ordered[low - 1] + (position - low) * (ordered[low] - ordered[low - 1])
    got = weibull_quantiles(samples, [position / (m + 1)])[0]
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-5)


@given(st.floats(0.001, 0.999))
def test_required_paths_just_reach_the_quantile(p: float) -> None:
    m = required_paths(p)
    nearly = 1e-8
    assert 1 / (m + 1) <= p + nearly
    assert p - nearly <= m / (m + 1)
    assert m == 1 or p < 1 / m or p > (m - 1) / m


@pytest.mark.parametrize(
    ("p", "paths"), [(0.5, 1), (0.05, 19), (0.95, 19), (0.1, 9), (0.9, 9), (0.01, 99), (0.25, 3)]
)
def test_required_paths_of_usual_quantiles(p: float, paths: int) -> None:
    assert required_paths(p) == paths
    check_supported([p], paths)
    if paths > 1:
        with pytest.raises(ValueError, match=f"at least {paths} paths, not {paths - 1}"):
            check_supported([p], paths - 1)


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_probability_outside_0_and_1_raises(p: float) -> None:
    with pytest.raises(ValueError, match="not between 0 and 1"):
        weibull_quantiles([1.0, 2.0], [p])


def test_other_axes_follow_that_of_the_quantiles() -> None:
    samples = np.arange(3 * 9 * 2, dtype=np.float32).reshape(3, 9, 2)
    got = weibull_quantiles(samples, [0.1, 0.5, 0.9], axis=1)
    assert got.shape == (3, 3, 2)
    assert np.array_equal(got, samples[:, [0, 4, 8]].transpose(1, 0, 2))
    with pytest.raises(ValueError, match="at least 9 paths, not 3"):
        weibull_quantiles(samples, [0.1])


def test_bands_of_few_samples_have_their_nominal_coverage() -> None:
    rng = np.random.default_rng(0)
    samples, outcome = rng.normal(size=(9, 40_000)), rng.normal(size=40_000)
    low, high = weibull_quantiles(samples, [0.1, 0.9])
    assert np.mean((low < outcome) & (outcome < high)) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    ("p", "name"), [(0.05, "q05"), (0.5, "q50"), (0.95, "q95"), (0.975, "q97.5"), (0.001, "q00.1")]
)
def test_quantile_names(p: float, name: str) -> None:
    assert quantile_name(p) == name


def _paths(closes: object) -> np.ndarray:
    return np.repeat(np.asarray(closes, np.float32)[..., None], 6, axis=-1)


def test_summary_follows_its_definition() -> None:
    rng = np.random.default_rng(1)
    closes = (100 * np.exp(rng.normal(0, 0.01, (39, 12)).cumsum(1))).astype(np.float32)
    got = summarise(_paths(closes), 100.0, [0.05, 0.5])
    final = np.sort(closes[:, -1].astype(np.float64) / 100 - 1)
    logs = np.diff(np.log(np.c_[np.full(39, 100.0), closes.astype(np.float64)]), axis=1)
    assert got.p_up == np.mean(closes[:, -1] > 100)
    assert got.expected_return == pytest.approx(final.mean())
    assert got.volatility == pytest.approx(np.median(logs.std(axis=1)))
    assert got.return_quantiles == {
        "q05": pytest.approx(final[1]),  # position 0.05 x 40
        "q50": pytest.approx(final[19]),
    }
    assert got.value_at_risk_95 == pytest.approx(-final[1])
    assert got.to_dict()["p_up"] == got.p_up


def test_unchanged_price_is_not_up() -> None:
    got = summarise(_paths(np.full((20, 3), 7.0)), 7.0, [0.5])
    assert got.p_up == 0
    assert got.volatility == 0
    assert got.value_at_risk_95 == 0


def test_value_at_risk_of_too_few_paths_is_none() -> None:
    got = summarise(_paths(np.full((18, 3), 7.0)), 7.0, [0.05, 0.5])
    assert got.value_at_risk_95 is None
    assert got.return_quantiles == {"q05": None, "q50": 0.0}


@pytest.mark.parametrize("last", [0.0, -37.63])
def test_returns_from_a_price_that_is_not_positive_are_none(last: float) -> None:
    got = summarise(_paths(np.full((20, 3), 1.0)), last, [0.5])
    assert got.p_up == 1
    assert (got.expected_return, got.volatility, got.value_at_risk_95) == (None, None, None)
    assert got.return_quantiles == {"q50": None}


def test_paths_below_zero_count_as_most_volatile() -> None:
    closes = np.full((20, 3), 2.0)
    closes[:9, 1] = -1.0
    assert summarise_closes(closes, 2.0, [0.5]).volatility == 0
    closes[:10, 1] = 0.0
    assert summarise_closes(closes, 2.0, [0.5]).volatility is None


def test_volatility_of_one_bar_is_none() -> None:
    assert summarise_closes(np.full((20, 1), 2.0), 2.0, [0.5]).volatility is None


def test_nan_paths_raise() -> None:
    with pytest.raises(ValueError, match="NaN"):
        summarise_closes(np.array([[1.0, np.nan]]), 1.0, [0.5])
