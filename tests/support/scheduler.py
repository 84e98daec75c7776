"""A scheduler in virtual time with a worker of known speed."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import numpy as np

from kronos_stream.bars.window import Window
from kronos_stream.daemon.inference.backend import BatchResult
from kronos_stream.daemon.inference.protocol import InferenceFailure, InferenceResult
from kronos_stream.daemon.requests import ForecastRequest, ForecastResult
from kronos_stream.daemon.scheduling.scheduler import Scheduler
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.forecast.outlook import Outlook
from kronos_stream.forecast.summary import Summary
from kronos_stream.market.candle import Candle
from kronos_stream.market.clock import Clock, LoopClock
from kronos_stream.market.series import Series
from kronos_stream.testing.virtual_time import run_virtual
from tests.support.fake_worker import FakeWorker

START = 1_700_000_040_000
"""UTC ms at the start; the open of a minute."""

_OUTLOOK = Outlook([], {}, Summary(0.5, 0.0, {}, 0.0, 0.0), 0)


def make_series(count: int, timeframe: str = "1s") -> list[Series]:
    return [Series.parse(f"test:S{i}/X:{timeframe}") for i in range(count)]


def request_at(
    series: Series, close: int, late: int = 0, revision: int = 0, skip_reason: str | None = None
) -> ForecastRequest:
    """Request for the bar that closes at ``close`` and arrives ``late`` ms afterwards."""
    origin = series.timeframe.after(close, -1)
    return ForecastRequest(series, origin, revision, close, close + late, skip_reason)


def window_of(request: ForecastRequest) -> Window:
    candle = Candle(request.origin, 1, 1, 1, 1, 1)
    times = np.array([request.origin])
    return Window(
        request.series, np.ones((1, 6), np.float32), times, 0, request.revision, candle, ()
    )


class TimedWorker(FakeWorker):
    """Takes a fixed time per series and records its batches: begin, windows and deadline."""

    def __init__(
        self, seconds_per_series: float = 0.001, fails: Callable[[Window], bool] | None = None
    ) -> None:
        super().__init__(seconds_per_series)
        self.seconds_per_series = seconds_per_series
        self.batches: list[tuple[float, list[Window], float]] = []
        self._fails = fails or (lambda _: False)

    async def forecast(self, windows: Sequence[Window], deadline: float) -> BatchResult:
        self.batches.append((asyncio.get_running_loop().time(), list(windows), deadline))
        seconds = self.estimate_seconds(len(windows))
        await asyncio.sleep(seconds)
        return BatchResult(
            [
                InferenceFailure("no") if self._fails(window) else InferenceResult(_OUTLOOK, 1.0)
                for window in windows
            ],
            seconds,
        )

    def batch_sizes(self) -> list[int]:
        return [len(windows) for _, windows, _ in self.batches]


class SchedulerHarness:
    """A scheduler, its worker, the bars it waits for and the results it published."""

    def __init__(
        self,
        worker: TimedWorker | None = None,
        *,
        clock: Clock | None = None,
        get_window: Callable[[ForecastRequest], Awaitable[Window | None]] | None = None,
        publish_seconds: float = 0.0,
        **settings: Any,
    ) -> None:
        self.clock = clock or LoopClock(START)
        self.worker = worker or TimedWorker()
        self.expected: dict[int, set[Series]] = defaultdict(set)
        """Series whose bar with this close is missing."""
        self.results: list[ForecastResult] = []
        self.metrics = Metrics()
        self.publish_seconds = publish_seconds
        self.scheduler = Scheduler(
            self.worker,
            get_window or self._get_window,
            lambda close: len(self.expected[close]),
            self._publish,
            self.clock,
            self.metrics,
            **settings,
        )

    async def _get_window(self, request: ForecastRequest) -> Window | None:
        return window_of(request)

    async def _publish(self, results: Sequence[ForecastResult]) -> Sequence[ForecastResult]:
        await asyncio.sleep(self.publish_seconds)
        self.results += results
        return results

    def submit(self, *requests: ForecastRequest) -> None:
        for request in requests:
            self.expected[request.close].discard(request.series)
            self.scheduler.submit(request)

    def outcomes(self) -> list[tuple[str, int, str]]:
        """Symbol, close in seconds after the start, and outcome of each published result."""
        return [
            (
                result.request.series.symbol,
                (result.request.close - START) // 1000,
                result.reason or result.outcome.result,
            )
            for result in self.results
        ]

    def published(self) -> dict[Series, list[ForecastRequest]]:
        """Requests of the published results, in order, by series."""
        requests = defaultdict(list)
        for result in self.results:
            requests[result.request.series].append(result.request)
        return requests


def run_scenario(
    scenario: Callable[[SchedulerHarness], Coroutine[Any, Any, None]], **settings: Any
) -> SchedulerHarness:
    """Run ``scenario`` beside the scheduler until all results are published."""

    async def main() -> SchedulerHarness:
        harness = SchedulerHarness(**settings)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(harness.scheduler.run())
            await scenario(harness)
            await harness.scheduler.drain()
            assert await harness.scheduler.finish(10)
        return harness

    return run_virtual(main())
