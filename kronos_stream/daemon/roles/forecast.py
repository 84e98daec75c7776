"""Role ``forecast``: one of a group that shares the candle topics out among its members.

Nothing is kept here: what the group has noted is its memory. A bar is noted as done once its
forecast is delivered, so a crash costs at most what was under way, which somebody else does again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from random import Random

import structlog

from kronos_stream.bars.window import Window
from kronos_stream.daemon.config.settings import Settings
from kronos_stream.daemon.delivery.publisher import (
    DeadLetterQueue,
    ForecastPublisher,
    build_composer,
)
from kronos_stream.daemon.inference.pool import InferenceBackend, WorkerFactory, create_backend
from kronos_stream.daemon.inference.protocol import ModelIdentity
from kronos_stream.daemon.partitions.tracker import PartitionTracker
from kronos_stream.daemon.requests import ForecastRequest, ForecastResult
from kronos_stream.daemon.roles.base import Role
from kronos_stream.daemon.scheduling.scheduler import Scheduler
from kronos_stream.daemon.status import watchdog
from kronos_stream.daemon.storage.state import State
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.feed import Feed
from kronos_stream.interfaces.sink import Sink
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_log = structlog.get_logger()

_REVOKE_TIMEOUT_SECONDS = 20.0
"""For the batch in hand when parts are taken from us; the group waits for us meanwhile."""

_DELIVERY_POLL_SECONDS = 0.05


class ForecastRole(Role):
    """One process's share of the group's series, from candle records to delivered forecasts."""

    def __init__(
        self,
        settings: Settings,
        feed: Feed,
        sinks: Sequence[Sink],
        *,
        clock: Clock,
        random: Random,
        wall: Clock | None = None,
        metrics: Metrics | None = None,
        worker_factory: WorkerFactory | None = None,
    ) -> None:
        """As of a Role.

        worker: makes what forecasts; left out, a process for each device.
        """
        super().__init__(settings, sinks, clock=clock, random=random, wall=wall, metrics=metrics)
        self._feed, self._worker_factory = feed, worker_factory
        self._removed_series: asyncio.Queue[Series] = asyncio.Queue()

    async def check(self) -> ModelIdentity:
        """Load the model, in place of :meth:`run`. Raises WorkerError."""
        worker = create_backend(self.settings, self.metrics, self._worker_factory)
        try:
            return await worker.start()
        finally:
            await worker.close()

    def readiness(self) -> dict[str, str]:
        found = {"worker": self._worker.problem(), **super().readiness()}
        found["candles"] = self._feed.problem
        if self.ready.is_set():
            found["candles"] = found["candles"] or self._tracker.unready_reason
            # Whoever works off what is old hears nothing new, and is no less ready for that.
            idle = not self._tracker.has_backlog
            venues = {series.venue for series in self._tracker.series if idle}
            found |= {
                f"source {one}": why
                for one, why in self._series_status.silent_venues(venues).items()
            }
        return found

    @property
    def series_count(self) -> int:
        """How many series."""
        return len(self._tracker.series) if self.ready.is_set() else 0

    async def _open(self, stack: AsyncExitStack) -> State:
        state = await State.open(None)
        stack.push_async_callback(state.close)
        self._worker: InferenceBackend = create_backend(
            self.settings, self.metrics, self._worker_factory
        )
        stack.push_async_callback(self._worker.close)
        stack.push_async_callback(self._feed.close)
        return state

    def _stall_checks(self) -> Sequence[Iterable[watchdog.StallCheck]]:
        return (
            watchdog.forecast_checks(self._scheduler, self._worker, self.metrics),
            watchdog.delivery_checks(self._outbox.queues.items()),
            watchdog.feed_checks(self._feed),
        )

    async def _work(self) -> None:
        if not await self._run_until_stopped(self._start()):
            return
        async with asyncio.TaskGroup() as tasks:
            beside = [
                tasks.create_task(work)
                for work in (
                    self._worker.run(),
                    self._scheduler.run(),
                    self._dead_letters.run(),
                    self._track_deliveries(),
                    self._publish_removals(),
                )
            ]
            reading = tasks.create_task(self._feed.run(self._tracker))
            self.watchdog.set_checks(*self._stall_checks())
            self.ready.set()
            _log.info("reads candles as one of a group")
            await self._stop.wait()
            self.ready.clear()
            began = asyncio.get_running_loop().time()
            reading.cancel()
            await asyncio.wait([reading])
            self._scheduler.cancel_waiting()
            whole = await self._scheduler.finish(self.settings.stop_grace)
            await self._dead_letters.flush()
            await self._drain_outbox(began, batch_finished=whole)
            self._tracker.mark_delivered(self._outbox.delivered_sequence)
            await self._feed.close()
            for task in beside:
                task.cancel()

    async def _start(self) -> None:
        identity = await self._worker.start()
        settings = self.settings
        self._dead_letters = DeadLetterQueue(self._outbox, self._wall)
        self._tracker = PartitionTracker(
            self._submit,
            self._removed_series.put_nowait,
            self._dead_letters.put,
            self._drain_in_flight,
            self._clock,
            self.metrics,
            lookback=settings.lookback,
            catch_up=settings.catch_up,
            degraded=settings.degraded,
        )
        self._series_status.track(lambda: self._tracker.series)
        self._publisher = ForecastPublisher(
            build_composer(settings.forecast_config(), identity),
            self._outbox,
            self._clock,
            self._wall,
            is_followed=lambda _: True,
            on_published=self._series_status.record,
            record_outcomes=False,
        )
        self._scheduler = Scheduler(
            self._worker,
            self._window,
            self._tracker.outstanding_bars,
            self._publish,
            self._clock,
            self.metrics,
            catch_up=settings.catch_up,
            batch_wait=settings.batch_wait,
            batch_deadline=settings.batch_deadline,
            max_deadline=_REVOKE_TIMEOUT_SECONDS,  # batches are sized to half of it
        )

    # -- from due bars to delivered forecasts ----------------------------------------------

    def _submit(self, request: ForecastRequest) -> None:
        """The allotment's word to the scheduler, which is made after it."""
        self._scheduler.submit(request)

    async def _window(self, request: ForecastRequest) -> Window | None:
        return self._tracker.window(request)

    async def _publish(self, results: Sequence[ForecastResult]) -> Sequence[ForecastResult]:
        """Put forecasts into the outbox; what was taken from us meanwhile is somebody else's."""
        ours = [result for result in results if self._tracker.owns(result.request)]
        if not ours:
            return ours
        told = await self._publisher.publish(ours)
        for result in ours:
            self._tracker.mark_published(result.request, self._outbox.last_sequence)
        return told

    async def _publish_removals(self) -> None:
        """Tell readers of series that are given up; until cancelled."""
        while True:
            series = await self._removed_series.get()
            if self._tracker.removal_pending(series):
                await self._publisher.retract([series.name])
                self._tracker.mark_published(series, self._outbox.last_sequence)

    async def _track_deliveries(self) -> None:
        """See what is delivered, until cancelled."""
        while True:
            self._tracker.mark_delivered(self._outbox.delivered_sequence)
            await asyncio.sleep(_DELIVERY_POLL_SECONDS)

    async def _drain_in_flight(self) -> None:
        """Parts are about to be taken: finish and deliver the batch in hand, within a while."""
        self._scheduler.cancel_waiting()
        with suppress(TimeoutError):
            async with asyncio.timeout(_REVOKE_TIMEOUT_SECONDS):
                await self._scheduler.drain()
                await self._outbox.drain(_REVOKE_TIMEOUT_SECONDS)
        self._tracker.mark_delivered(self._outbox.delivered_sequence)
