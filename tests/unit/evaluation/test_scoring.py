"""Scores compared with formulas, and walk-forward evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kronos_stream.commands._generated_cases import generated_cases
from kronos_stream.evaluation.baselines import random_walk
from kronos_stream.evaluation.cases import Case, History, file_cases
from kronos_stream.evaluation.scoring import block_bootstrap, covered, fair_crps, path_volatility
from kronos_stream.evaluation.walk_forward import evaluate


def test_fair_crps_does_not_depend_on_the_number_of_samples() -> None:
    rng = np.random.default_rng(0)
    outcome = rng.standard_normal(200_000)
    # A standard normal's CRPS for its own outcomes averages 1/sqrt(pi).
    for m in (2, 8, 32):
        score = fair_crps(rng.standard_normal((m, 200_000)), outcome).mean()
        assert score == pytest.approx(np.pi**-0.5, rel=0.01)


def test_crps_of_one_point_is_its_error() -> None:
    assert fair_crps(np.full((2, 1), 3.0), np.array([5.0])) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="two samples"):
        fair_crps(np.zeros((1, 1)), np.zeros(1))


def test_bands_have_their_nominal_coverage() -> None:
    rng = np.random.default_rng(1)
    inside = covered(rng.standard_normal((32, 50_000)), rng.standard_normal(50_000), 0.8)
    assert inside.mean() == pytest.approx(0.8, abs=0.01)


def test_path_volatility_counts_the_first_step() -> None:
    assert path_volatility(np.array([1.0, 1.0])) == pytest.approx(0.5)


def test_block_bootstrap_is_wider_for_correlated_blocks() -> None:
    rng = np.random.default_rng(2)
    correlated = np.repeat(rng.standard_normal(50), 20)
    ones = np.ones(1_000)
    joint = block_bootstrap([correlated + 5, ones], np.repeat(np.arange(50), 20))[0]
    apart = block_bootstrap([correlated + 5, ones], np.arange(1_000))[0]
    assert joint.value == pytest.approx(correlated.mean() + 5)
    assert joint.low < joint.value < joint.high
    assert joint.high - joint.low > 2 * (apart.high - apart.low)


def _random_walk(
    histories: Sequence[History], horizon: int, paths: int
) -> list[NDArray[np.floating]]:
    return random_walk(paths=paths, seed=3)(histories, horizon, paths)


def test_random_walk_scores_like_the_random_walk_baseline() -> None:
    cases = generated_cases(["5m", "1h"], count=300, horizon=6, truth_paths=8)
    report = evaluate(cases, _random_walk, paths=64)
    assert report.cases >= 300
    assert report.crps_ratio["random walk"].value == pytest.approx(1, abs=0.03)
    assert report.crps_ratio["last value"].high < 0.9
    assert report.crps_ratio["truth"].value > 1
    assert len(report.crps_ratio_by_step["truth"]) == 6
    assert set(report.coverage) == {"50%", "80%", "90%"}
    assert report.to_dict()["coverage"]["80%"][0] == report.coverage["80%"].value


def test_forecast_never_sees_the_future() -> None:
    """NaN after the origin changes no input of a forecast, only its scores."""
    seen: list[NDArray[np.float64]] = []

    def record(
        histories: Sequence[History], horizon: int, paths: int
    ) -> list[NDArray[np.floating]]:
        seen.extend(h.values.copy() for h in histories)
        return _random_walk(histories, horizon, paths)

    cases = list(generated_cases(["5m"], count=32, horizon=4))
    evaluate(cases, record)
    clean, seen = seen, []
    poisoned = [replace(case, future=np.full_like(case.future, np.nan)) for case in cases]
    report = evaluate(poisoned, record)
    for a, b in zip(clean, seen, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.isnan(report.crps["model"])


def test_cases_of_a_file_contain_no_gap(tmp_path: Path) -> None:
    times = np.arange(60) * 60_000 + 1_700_000_040_000
    kept = np.delete(times, [20, 21])
    lines = [f"{t},1,1.1,0.9,{1 + i % 3 / 100},5" for i, t in enumerate(kept)]
    path = tmp_path / "c.csv"
    path.write_text("time,open,high,low,close,volume\n" + "\n".join(lines) + "\n")
    cases: list[Case] = list(file_cases([path], lookback=10, horizon=4, stride=1))
    assert len(cases) == (20 - 13) + (38 - 13)
    assert all((np.diff(case.history.times) == 60_000).all() for case in cases)


def test_no_cases_raise() -> None:
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate([], _random_walk)
