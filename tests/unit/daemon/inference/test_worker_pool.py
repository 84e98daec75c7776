"""Several devices: a worker each, together as if they were one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from kronos_stream.bars.window import Window
from kronos_stream.daemon.config.settings import Settings, SettingsError
from kronos_stream.daemon.inference.backend import BatchResult, WorkerError
from kronos_stream.daemon.inference.pool import WorkerPool, create_backend
from kronos_stream.daemon.inference.protocol import ModelIdentity
from kronos_stream.daemon.inference.supervisor import WorkerSupervisor
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.market.candle import Candle
from kronos_stream.market.series import Series
from tests.support.fake_worker import FakeWorker


def _window(number: int) -> Window:
    random = np.random.default_rng(number)
    values = np.abs(100 + random.normal(0, 0.2, (64, 6))).astype(np.float32)
    values[:, 1], values[:, 2] = values[:, :4].max(1), values[:, :4].min(1)
    times = np.arange(64, dtype=np.int64) * 60_000
    last = Candle(int(times[-1]), *(float(one) for one in values[-1]))
    return Window(Series.parse(f"x:S{number}/Y:1m"), values, times, 0, 0, last)


class _OtherFakeWorker(FakeWorker):
    def __init__(self, pace: float, **differs: str) -> None:
        super().__init__(pace)
        self.sizes: list[int] = []
        self._differs = differs

    async def start(self) -> ModelIdentity:
        return replace(await super().start(), **self._differs)  # type: ignore[arg-type]

    async def forecast(self, windows: Sequence[Window], deadline: float) -> BatchResult:
        self.sizes.append(len(windows))
        return await super().forecast(windows, deadline)


async def test_a_batch_is_shared_out_by_speed_and_comes_back_in_order() -> None:
    quick, slow = _OtherFakeWorker(0.001), _OtherFakeWorker(0.003)
    crew = WorkerPool([quick, slow])
    windows = [_window(number) for number in range(40)]
    batch = await crew.forecast(windows, 5)
    assert (quick.sizes, slow.sizes) == ([30], [10])
    outlooks = [drawn.outlook for drawn in batch.results]  # type: ignore[union-attr]
    closes = [outlook.channels["close"]["q50"][0] for outlook in outlooks]
    assert closes == [window.last.close for window in windows]
    assert crew.estimate_seconds(40) == pytest.approx(0.030)
    assert crew.capacity(0.3) == 400
    assert (await crew.forecast(windows[:1], 5)).results
    assert (await crew.forecast([], 5)).results == []


async def test_cards_of_one_host_speak_as_one_and_unlike_devices_are_refused() -> None:
    cards = WorkerPool([_OtherFakeWorker(0.0, device="cuda"), _OtherFakeWorker(0.0, device="cuda")])
    assert (await cards.start()).device == "cuda"
    mixed = WorkerPool(
        [_OtherFakeWorker(0.0), _OtherFakeWorker(0.0, device="cuda", dtype="bfloat16")]
    )
    with pytest.raises(WorkerError, match=r"do not forecast alike: cpu .* cuda in bfloat16"):
        await mixed.start()


@pytest.mark.parametrize("device", ["", ",", "cpu,", "cuda:0,,cuda:1"])
def test_a_list_with_holes_is_refused(device: str) -> None:
    with pytest.raises((SettingsError, ValueError), match="expected a device"):
        Settings(device=device)


async def test_two_workers_forecast_what_one_does_also_after_one_was_killed() -> None:
    """Real processes on the CPU: the numbers do not depend on who draws them."""
    settings = Settings(
        model="nano", lookback=64, horizon=2, paths=4, quantiles=(0.5,), threads=1, device="cpu,cpu"
    )
    metrics = Metrics()
    crew = create_backend(settings, metrics)
    assert isinstance(crew, WorkerPool)
    alone = create_backend(settings.model_copy(update={"device": "cpu"}), metrics)
    try:
        await asyncio.gather(crew.start(), alone.start())
        windows = [_window(number) for number in range(9)]
        expected = (await alone.forecast(windows, 30)).results
        assert (await crew.forecast(windows, 30)).results == expected
        victim = crew._workers[1]
        assert isinstance(victim, WorkerSupervisor)
        assert victim._process is not None
        victim._process._process.kill()
        assert (await crew.forecast(windows, 30)).results == expected
        assert metrics.worker_restarts.labels("crash")._value.get() == 1
    finally:
        await asyncio.gather(crew.close(), alone.close())
