"""Pools of workers on several devices."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from dataclasses import replace

import pytest

from kronos_stream.bars.window import Window
from kronos_stream.daemon.config.settings import Settings, SettingsError
from kronos_stream.daemon.inference.backend import BatchResult, WorkerError
from kronos_stream.daemon.inference.pool import WorkerPool, create_backend
from kronos_stream.daemon.inference.protocol import ModelIdentity
from kronos_stream.daemon.inference.supervisor import WorkerSupervisor
from kronos_stream.daemon.telemetry.metrics import Metrics
from tests.support.fake_worker import FakeWorker
from tests.support.windows import random_window
from tests.support.workers import BATCH_SECONDS, NANO_CONFIG, restart_counts


class _RecordingWorker(FakeWorker):
    """Records the sizes of its batches; ``engine`` replaces fields of its engine."""

    def __init__(self, seconds_per_forecast: float, **engine: str) -> None:
        super().__init__(seconds_per_forecast)
        self.sizes: list[int] = []
        self._engine = engine

    async def start(self) -> ModelIdentity:
        identity = await super().start()
        return identity._replace(engine=identity.engine.model_copy(update=self._engine))

    async def forecast(self, windows: Sequence[Window], deadline: float) -> BatchResult:
        self.sizes.append(len(windows))
        return await super().forecast(windows, deadline)


async def test_batch_is_divided_by_speed_and_returned_in_order() -> None:
    quick, slow = _RecordingWorker(0.001), _RecordingWorker(0.003)
    pool = WorkerPool([quick, slow])
    windows = [random_window(number) for number in range(40)]
    batch = await pool.forecast(windows, 5)
    assert (quick.sizes, slow.sizes) == ([30], [10])
    outlooks = [result.outlook for result in batch.results]  # type: ignore[union-attr]
    closes = [outlook.channels["close"]["q50"][0] for outlook in outlooks]
    assert closes == [window.last.close for window in windows]
    assert pool.estimate_seconds(40) == pytest.approx(0.030)
    assert pool.capacity(0.3) == 400
    assert (await pool.forecast(windows[:1], 5)).results
    assert (await pool.forecast([], 5)).results == []


async def test_pool_has_one_identity_and_refuses_devices_of_different_kinds() -> None:
    gpus = WorkerPool([_RecordingWorker(0.0, device="cuda"), _RecordingWorker(0.0, device="cuda")])
    assert (await gpus.start()).engine.device == "cuda"
    mixed = WorkerPool(
        [_RecordingWorker(0.0), _RecordingWorker(0.0, device="cuda", dtype="bfloat16")]
    )
    with pytest.raises(WorkerError, match=r"do not forecast alike: cpu .* cuda in bfloat16"):
        await mixed.start()


@pytest.mark.parametrize("device", ["", ",", "cpu,", "cuda:0,,cuda:1"])
def test_list_of_devices_with_empty_items_is_refused(device: str) -> None:
    with pytest.raises((SettingsError, ValueError), match="expected a device"):
        Settings(device=device)


async def test_two_workers_forecast_like_one_even_after_a_crash() -> None:
    """Real processes on the CPU: the numbers do not depend on the worker."""
    config = replace(NANO_CONFIG, horizon=2, paths=4, quantiles=(0.5,))
    metrics = Metrics()
    pool = create_backend(config, ["cpu", "cpu"], metrics)
    assert isinstance(pool, WorkerPool)
    single = create_backend(config, ["cpu"], metrics)
    assert isinstance(single, WorkerSupervisor)
    try:
        await asyncio.gather(pool.start(), single.start())
        windows = [random_window(number) for number in range(9)]
        expected = (await single.forecast(windows, BATCH_SECONDS)).results
        assert (await pool.forecast(windows, BATCH_SECONDS)).results == expected
        crashed = pool._workers[1]
        assert isinstance(crashed, WorkerSupervisor)
        assert crashed.pid is not None
        os.kill(crashed.pid, signal.SIGKILL)
        assert (await pool.forecast(windows, BATCH_SECONDS)).results == expected
        assert restart_counts(metrics) == {"hang": 0, "crash": 1}
    finally:
        await asyncio.gather(pool.close(), single.close())
