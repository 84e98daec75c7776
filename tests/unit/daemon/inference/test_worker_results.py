"""Forecasts of the worker process with the nano model, and settings it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from kronos_stream import Context, Forecaster
from kronos_stream.bars.scaling import price_scale, scale_prices
from kronos_stream.bars.window import Window
from kronos_stream.daemon.inference.backend import WorkerError, WorkerLost
from kronos_stream.daemon.inference.protocol import (
    ForecastConfig,
    InferenceFailure,
    InferenceResult,
)
from kronos_stream.daemon.inference.supervisor import WorkerSupervisor
from kronos_stream.daemon.inference.worker_main import ModelHost
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.forecast.outlook import Outlook, build_outlook
from tests.support.windows import random_window
from tests.support.workers import BATCH_SECONDS, NANO_CONFIG, started_worker


@pytest.fixture(scope="module")
def nano() -> Forecaster:
    return Forecaster.from_pretrained("nano", device="cpu", dtype="float32")


def _expected_outlook(nano: Forecaster, window: Window) -> Outlook:
    """Outlook of ``window`` computed in this process, in a batch of its own."""
    scale = price_scale(window.values)
    values = window.values.copy()
    values[:, [0, 1, 2, 3, 5][: window.values.shape[1] - 1]] *= np.float32(scale)
    context = Context(values, window.times, window.series.name, "1s")
    (paths,) = nano.sample([context], 8, 20, top_p=0.9, seed=3, anchor=True)
    paths[..., [0, 1, 2, 3, 5]] /= np.float32(scale)
    times = window.times[-1] + 1000 * np.arange(1, 9)
    return build_outlook(paths, times, window.last.close, NANO_CONFIG.quantiles)


def _outlooks(results: Sequence[InferenceResult | InferenceFailure]) -> list[Outlook]:
    assert all(isinstance(result, InferenceResult) for result in results), results
    return [result.outlook for result in results if isinstance(result, InferenceResult)]


async def test_forecasts_do_not_depend_on_their_batch(nano: Forecaster) -> None:
    """They are bit for bit those of the engine; an invalid context affects no other."""
    windows = [
        *(random_window(i, bars=96 - i % 40) for i in range(30)),
        *(random_window(i, columns=5) for i in range(30, 34)),
        *(random_window(i, price=10.0**-i) for i in range(4, 12)),
    ]
    expected = [_expected_outlook(nano, window) for window in windows]
    invalid = replace(windows[0], values=np.full_like(windows[0].values, np.nan))
    worker = WorkerSupervisor(NANO_CONFIG, Metrics())
    identity = await worker.start()
    try:
        assert (identity.model.name, identity.model.tokenizer) == ("nano", "nano")
        assert identity.model.revision is not None
        assert identity.engine.dtype == "float32"
        assert worker.estimate_seconds(1) > 0
        random = np.random.default_rng(0)
        for size in (len(windows), 17, 1):
            chosen = random.permutation(len(windows))[:size]
            batch = await worker.forecast([*(windows[i] for i in chosen), invalid], BATCH_SECONDS)
            assert _outlooks(batch.results[:-1]) == [expected[i] for i in chosen]
            (failure,) = batch.results[-1:]
            assert isinstance(failure, InferenceFailure)
            assert "S0/X" in failure.reason
            assert batch.seconds > 0
    finally:
        await worker.close()
    assert worker.pid is None


def test_tiny_prices_are_forecast_like_large_ones(nano: Forecaster) -> None:
    """A coin priced in another unit has the same forecast in that unit."""
    window = random_window(1, price=64.0)
    scale = 2.0 ** -np.floor(np.log2(window.values[:, 3].std()))
    window = replace(window, values=scale_prices(window.values, scale))
    window = replace(window, last=window.last._replace(close=float(window.values[-1, 3])))
    assert price_scale(window.values) == 1
    tiny = replace(
        window,
        values=scale_prices(window.values, 2.0**-40),
        last=window.last._replace(close=window.last.close * 2.0**-40),
    )
    large, small = _expected_outlook(nano, window), _expected_outlook(nano, tiny)
    assert small.summary.return_quantiles == large.summary.return_quantiles
    for name, band in large.channels["close"].items():
        np.testing.assert_allclose(
            np.array(small.channels["close"][name]) * 2.0**40, band, rtol=1e-6
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(NANO_CONFIG, lookback=250), "250 bars and a horizon of 8 exceed the 256 bars"),
        (replace(NANO_CONFIG, paths=18), "quantile 0.05 needs at least 19 paths"),
        (replace(NANO_CONFIG, top_p=0.0), "top_p 0"),
        (replace(NANO_CONFIG, dtype="float8"), "dtype 'float8'"),
    ],
)
def test_model_host_refuses_unusable_settings(config: ForecastConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelHost(config)


async def test_start_reports_unusable_settings_to_the_user() -> None:
    worker = WorkerSupervisor(replace(NANO_CONFIG, model="no/such/model"), Metrics())
    with pytest.raises(WorkerError, match="no/such/model"):
        await worker.start()
    assert worker.pid is None


async def test_start_reports_a_process_that_exits_as_lost() -> None:
    command = (sys.executable, "-c", "raise SystemExit(3)")
    with pytest.raises(WorkerLost, match="did not start"):
        async with started_worker(command=command):
            pass


def test_daemon_process_imports_no_torch() -> None:
    """It would cost the event loop's process 280 MB."""
    code = "import sys, kronos_stream.daemon.scheduling.scheduler; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603
