"""Scheduler of forecasts: batches by bar close, one at a time, and an outcome for every bar.

While one batch is computed, the next one is collected (:mod:`~.batcher`). Each series' results
are published in order, even if they become ready out of order (:mod:`~.ordering`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import structlog

from kronos_stream.bars.window import Window
from kronos_stream.daemon.inference.backend import InferenceBackend
from kronos_stream.daemon.inference.protocol import InferenceFailure, InferenceResult
from kronos_stream.daemon.requests import ForecastRequest, ForecastResult
from kronos_stream.daemon.scheduling.batcher import Batcher, valid_until
from kronos_stream.daemon.scheduling.ordering import Pending, ResultSequencer
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.market.clock import Clock
from kronos_stream.market.timeframe import Timeframe

_log = structlog.get_logger()

CatchUp = Literal["newest", "all"]

_YIELD_EVERY = 32
"""Windows built before other tasks get a turn."""

_PUBLISH_CHUNK = 256
"""Results published at a time."""

_MIN_DEADLINE_SECONDS = 2.0
_MAX_DEADLINE_SECONDS = 60.0


class Scheduler:
    """Turns forecast requests into results. Call :meth:`run` once, :meth:`submit` at any time."""

    def __init__(
        self,
        worker: InferenceBackend,
        get_window: Callable[[ForecastRequest], Awaitable[Window | None]],
        outstanding_bars: Callable[[int], int],
        publish: Callable[[Sequence[ForecastResult]], Awaitable[Sequence[ForecastResult]]],
        clock: Clock,
        metrics: Metrics,
        *,
        catch_up: CatchUp = "newest",
        batch_wait: float | None = None,
        batch_deadline: float | None = None,
        max_deadline: float = _MAX_DEADLINE_SECONDS,
        max_batch_size: int = 1000,
        max_backlog: int = 200_000,
    ) -> None:
        """get_window: context of a request; None if it is no longer available.

        outstanding_bars: number of live series whose bar with this close, UTC ms, is missing.
        publish: returns once the results are durable, with those that were published; they may
            differ from the ones given. Its errors end :meth:`run`.
        catch_up: with a backlog, "newest" skips a bar if a newer one of its series is waiting;
            "all" forecasts every bar.
        batch_wait: seconds after the first bar of a close to wait for the others; None takes a
            quarter of the time for which the forecast is valid, at most 2.
        batch_deadline: seconds for a batch in the worker; None takes 0.8 of the timeframe, between
            2 and ``max_deadline``. Batches are sized to take at most half of it.
        max_deadline: seconds; limits the deadline unless ``batch_deadline`` is set.
        max_batch_size: series. max_backlog: waiting bars; beyond it the oldest are skipped, even
            with "all".
        """
        self._worker, self._get_window, self._publish = worker, get_window, publish
        self._clock, self._metrics = clock, metrics
        self._catch_up = catch_up
        self._batch_wait, self._batch_deadline = batch_wait, batch_deadline
        self._max_deadline, self._max_batch_size = max_deadline, max_batch_size
        self._max_backlog = max_backlog
        self._sequencer = ResultSequencer()
        self._batcher = Batcher(outstanding_bars, batch_wait)
        self._waiting = self._batches = self._drain_callers = 0
        self._finishing = self._batching_done = False
        self._wakeup, self._drained, self._stopped = (asyncio.Event() for _ in range(3))
        self._drained.set()

    def submit(self, request: ForecastRequest) -> None:
        """Accept a request; those of a series must come in order."""
        if self._finishing:
            return
        self._drained.clear()
        item = Pending(request, self._clock.now())
        previous = self._sequencer.add(item)
        self._waiting += 1
        self._metrics.close_to_received.observe(max(0, request.received - request.close) / 1000)
        if previous is not None and previous.request.origin == request.origin:
            self._skip(previous, "revised")
        elif previous is not None and self._catch_up == "newest":
            self._skip(previous, "overrun")
        if self._waiting > self._max_backlog:
            oldest = self._sequencer.oldest_waiting(request.series)
            if oldest is not None:
                self._skip(oldest, "overrun")
        if request.skip_reason is not None:
            self._skip(item, request.skip_reason)
        else:
            self._batcher.add(item)
            self._wakeup.set()
        self._metrics.queue_depth.labels("due").set(self._waiting)

    async def run(self) -> None:
        """Run until cancelled or :meth:`finish`. Raises errors of ``publish`` and the worker."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._run_batches())
                tasks.create_task(self._publish_results())
        finally:
            self._stopped.set()

    async def drain(self) -> None:
        """Return once all results are published; incomplete closes are no longer waited for."""
        self._drain_callers += 1
        self._wakeup.set()
        try:
            await self._drained.wait()
        finally:
            self._drain_callers -= 1

    @property
    def pending(self) -> int:
        """Number of requests whose results are not published yet."""
        return self._sequencer.pending

    @property
    def published(self) -> int:
        """Number of results published so far."""
        return self._sequencer.published

    @property
    def max_latency_seconds(self) -> float:
        """Longest time from a bar to its result, in seconds, if no batch has to be repeated."""
        deadline = self._batch_deadline or self._max_deadline
        return (self._batch_wait or 0.0) + max(deadline, 2 * self._worker.estimate_seconds(1))

    def cancel_waiting(self) -> None:
        """Cancel all requests that wait for a batch, and later ones of the same series.

        They get no result, and may be submitted again.
        """
        for item in self._sequencer.cancel_waiting():
            self._skip(item, "cancelled")

    async def finish(self, grace: float) -> bool:
        """Accept no more requests, finish the current batch and end :meth:`run`.

        Returns whether that was done within ``grace`` seconds. Waiting requests get no result;
        they are submitted again after a restart.
        """
        self._finishing = True
        self._wakeup.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._stopped.wait()
        return self._stopped.is_set()

    async def _run_batches(self) -> None:
        while not self._finishing:
            self._wakeup.clear()
            self._batcher.release(self._clock.now(), force=self._drain_callers > 0)
            batch, deadline = self._next_batch()
            if batch:
                await self._run_batch(batch, deadline)
            else:
                await self._wait_for_batch()
        self._batching_done = True
        self._sequencer.result_ready.set()

    async def _wait_for_batch(self) -> None:
        """Return after a new request, or at the deadline of the next incomplete close."""
        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(self._wakeup.wait())]
        end = self._batcher.next_deadline()
        if end is not None:
            waits.append(asyncio.ensure_future(self._clock.sleep_until(end)))
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in done:
                wait.result()
        finally:
            for wait in waits:
                wait.cancel()

    def _next_batch(self) -> tuple[list[Pending], float]:
        """Return the next batch and its deadline in seconds."""
        self._batcher.discard_resolved(self._drop_expired)
        ready = self._batcher.ready
        if not ready:
            return [], 0.0
        deadline = min(self._deadline(series.timeframe) for series in ready)
        batch = self._batcher.pop_batch(
            min(self._max_batch_size, self._worker.capacity(deadline / 2))
        )
        self._waiting -= len(batch)
        self._metrics.queue_depth.labels("due").set(self._waiting)
        return batch, max(deadline, 2 * self._worker.estimate_seconds(len(batch)))

    def _drop_expired(self, item: Pending) -> None:
        """Skip a request whose forecast would no longer be valid."""
        end = valid_until(item.request)
        if self._catch_up == "newest" and end <= self._clock.now():
            # The bar arrived too late, or it waited here too long.
            self._skip(item, "stale" if item.arrived >= end else "overrun")

    async def _run_batch(self, batch: Sequence[Pending], deadline: float) -> None:
        """Set the result of every request of the batch."""
        items, windows = await self._load_windows(batch)
        if not items:
            return
        now = self._clock.now()
        forecasts, seconds = await self._worker.forecast(windows, deadline)
        self._batches += 1
        self._metrics.batch_series.observe(len(items))
        self._metrics.compute_seconds.observe(seconds)
        _log.debug("batch done", batch=self._batches, series=len(items), seconds=round(seconds, 3))
        for item, window, forecast in zip(items, windows, forecasts, strict=True):
            queued = max(0, now - item.request.received)
            self._metrics.received_to_batched.observe(queued / 1000)
            result = ForecastResult(
                item.request, window, queued_ms=queued, compute_ms=round(1000 * seconds)
            )
            self._sequencer.set_result(item, self._with_forecast(result, forecast))

    async def _load_windows(self, batch: Sequence[Pending]) -> tuple[list[Pending], list[Window]]:
        """Return items with their windows; those without a window are skipped."""
        items: list[Pending] = []
        windows: list[Window] = []
        for i, item in enumerate(batch, 1):
            window = await self._get_window(item.request)
            if window is None:
                self._sequencer.set_result(item, ForecastResult(item.request, reason="gap"))
            else:
                items.append(item)
                windows.append(window)
            if i % _YIELD_EVERY == 0:
                await asyncio.sleep(0)
        return items, windows

    def _with_forecast(
        self, result: ForecastResult, forecast: InferenceResult | InferenceFailure
    ) -> ForecastResult:
        if isinstance(forecast, InferenceResult):
            return result._replace(outlook=forecast.outlook, scale=forecast.scale)
        request = result.request
        _log.warning(
            "forecast failed",
            series=request.series.name,
            origin=request.origin,
            batch=self._batches,
            why=forecast.reason,
        )
        return result._replace(reason="failed")

    def _skip(self, item: Pending, reason: str) -> None:
        """Set the result of a waiting request without a forecast."""
        self._waiting -= 1
        self._sequencer.set_result(item, ForecastResult(item.request, reason=reason))

    async def _publish_results(self) -> None:
        sequencer = self._sequencer
        while True:
            await sequencer.result_ready.wait()
            sequencer.result_ready.clear()
            while items := sequencer.pop_ready(_PUBLISH_CHUNK):
                results = [item.result for item in items if item.result and not item.cancelled]
                for outcome in (result.outcome for result in await self._publish(results)):
                    self._metrics.outcomes.labels(outcome.result, outcome.reason).inc()
                sequencer.mark_published(len(items))
                if not sequencer.pending:
                    self._drained.set()
            if self._batching_done:
                return

    def _deadline(self, timeframe: Timeframe) -> float:
        if self._batch_deadline is not None:
            return self._batch_deadline
        length = timeframe.milliseconds
        if length is None:  # months
            return self._max_deadline
        seconds = min(0.0008 * length, self._max_deadline)
        return max(_MIN_DEADLINE_SECONDS, seconds)
