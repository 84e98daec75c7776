"""A minute of varied forecasts in one process: memory stays bounded, and results stay equal.

``KRONOS_SOAK_SECONDS`` sets the length (60).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from kronos_stream import Context, Forecaster
from tests.support.processes import resident_mib

pytestmark = pytest.mark.soak

SECONDS = float(os.environ.get("KRONOS_SOAK_SECONDS", "60"))
MIN_BATCHES = 30
"""Lower bound for slow machines."""
MINUTE_MS = 60_000
GROWTH_MIB = 64
"""Growth allowed from the end of the warm-up to the end of the test."""


def random_context(random: np.random.Generator) -> Context:
    """A random walk of 16 to 112 one-minute candles."""
    length = int(random.integers(16, 113))
    close = 100 * np.exp(random.normal(0, 0.001, length).cumsum())
    opened = np.concatenate(([100.0], close[:-1]))
    volume = random.lognormal(3, 1, length)
    high, low = np.maximum(opened, close) * 1.0005, np.minimum(opened, close) * 0.9995
    values = np.stack((opened, high, low, close, volume, volume * close), axis=1)
    return Context(values, np.arange(length) * MINUTE_MS, timeframe="1m")


@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_varied_batches_leak_nothing(parity_folder: Path) -> None:
    """Batches of varying sizes neither grow the process nor change an early result."""
    tiny = parity_folder / "tiny"
    forecaster = Forecaster.from_pretrained(
        str(tiny / "predictor"),
        tokenizer=str(tiny / "tokenizer"),
        device="cpu",
        dtype="float32",
        max_context=128,
    )
    random = np.random.default_rng(0)
    first = random_context(random)
    (before,) = forecaster.sample([first], horizon=8, paths=4, seed=1)
    started, batches, warm = time.monotonic(), 0, None
    while (elapsed := time.monotonic() - started) < SECONDS or batches < MIN_BATCHES:
        contexts = [random_context(random) for _ in range(random.integers(1, 9))]
        horizons = [int(h) for h in random.integers(1, 17, len(contexts))]
        results = forecaster.sample(
            contexts, horizon=horizons, paths=int(random.integers(1, 17)), seed=batches
        )
        assert [paths.shape[1] for paths in results] == horizons
        assert all(np.isfinite(paths).all() for paths in results)
        batches += 1
        if warm is None and elapsed > SECONDS / 3 and batches >= MIN_BATCHES / 3:
            warm = resident_mib()
    assert warm is not None
    grown = resident_mib() - warm
    print(f"{batches} batches in {SECONDS:.0f} s; memory {warm:.0f} MiB, {grown:+.1f} MiB")  # noqa: T201
    assert grown < GROWTH_MIB
    (after,) = forecaster.sample([first], horizon=8, paths=4, seed=1)
    np.testing.assert_array_equal(after, before)
