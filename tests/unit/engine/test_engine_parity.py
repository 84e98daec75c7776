"""Parity of the engine and the compatible API with the reference implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kronos_stream import Context, Forecaster
from tests.support.parity import CASES, RELATIVE, Cases, greedy_case


@pytest.mark.parametrize("name", CASES[:3])
def test_greedy_paths_are_the_references(
    tiny_forecaster: Forecaster, parity_cases: Cases, parity_expected: dict[str, Any], name: str
) -> None:
    """Where the window holds history and horizon, the engine's greedy paths are the reference's."""
    bars, horizon = greedy_case(parity_expected, name)
    contexts = []
    for i in range(3):
        times = parity_cases[f"time_{i}"] * 1000
        future = times[bars : bars + horizon]
        contexts.append(
            Context(parity_cases[f"ohlcva_{i}"][:bars], times[:bars], future_times=future)
        )
    wanted = parity_cases[f"greedy_{name}"]
    for i, paths in enumerate(tiny_forecaster.sample(contexts, horizon, paths=2, top_k=1)):
        assert paths.shape == (2, horizon, 6)
        assert paths.dtype == np.float32
        np.testing.assert_allclose(paths[0], wanted[i], rtol=RELATIVE)
        np.testing.assert_array_equal(paths[1], paths[0])


@pytest.mark.parametrize("name", CASES[3:])
def test_sample_rejects_calls_beyond_the_window(
    tiny_forecaster: Forecaster, parity_cases: Cases, parity_expected: dict[str, Any], name: str
) -> None:
    """If they do not fit, ``sample`` raises an error instead of returning different numbers."""
    bars, horizon = greedy_case(parity_expected, name)
    context = Context(parity_cases["ohlcva_0"][:bars], parity_cases["time_0"][:bars] * 1000)
    with pytest.raises(ValueError, match=f"{bars} bars and a horizon of {horizon} exceed"):
        tiny_forecaster.sample([context], horizon, paths=1)
