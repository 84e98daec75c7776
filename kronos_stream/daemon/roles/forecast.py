"""Role ``forecast``: one of a consumer group that divides the candle topics among its members.

The role has no state file: committed offsets record what is done. A bar is done once its forecast
is delivered, so a crash loses only work in progress, which another member repeats.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import Any

import structlog

from kronos_stream.daemon.config.settings import Settings
from kronos_stream.daemon.inference.backend import WorkerFactory
from kronos_stream.daemon.partitions.tracker import PartitionTracker
from kronos_stream.daemon.requests import ForecastResult
from kronos_stream.daemon.roles import stall_checks
from kronos_stream.daemon.roles.base import Role
from kronos_stream.daemon.roles.forecasting import Forecasting
from kronos_stream.daemon.status.series import SeriesStatusRegistry
from kronos_stream.daemon.status.watchdog import StallCheck
from kronos_stream.interfaces.feed import Feed
from kronos_stream.interfaces.sink import Sink
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_log = structlog.get_logger()

_REVOKE_TIMEOUT_SECONDS = 20.0
"""For the current batch when partitions are revoked; the group waits for it."""

_DELIVERY_POLL_SECONDS = 0.05


class FeedIntake:
    """Candle topics as source of bars, with the tracker of the assigned partitions."""

    tracker: PartitionTracker

    def __init__(self, feed: Feed, status: SeriesStatusRegistry) -> None:
        self._feed, self._status = feed, status
        self._started = False

    @property
    def series_count(self) -> int:
        return len(self.tracker.series) if self._started else 0

    def problems(self) -> Mapping[str, str]:
        if not self._started:
            return {"candles": self._feed.problem}
        found = {"candles": self._feed.problem or self.tracker.unready_reason}
        # While a backlog is worked off no new bars are read, which does not make a venue silent.
        if not self.tracker.has_backlog:
            venues = {series.venue for series in self.tracker.series}
            silent = self._status.silent_venues(venues)
            found |= {f"source {venue}": why for venue, why in silent.items()}
        return found

    def stall_checks(self) -> Iterable[StallCheck]:
        return stall_checks.feed(self._feed)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Event]:
        """Read candles inside this context. The event is never set: topics do not end."""
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(self._feed.run(self.tracker))
            self._started = True
            _log.info("reading candles as a member of the group")
            yield asyncio.Event()
            self._started = False
            reading.cancel()

    async def reload(self) -> None:
        _log.info("this role has no symbols file to reload", role="forecast")

    async def close(self) -> None:
        await self._feed.close()


class ForecastRole(Role):
    """Everything from the bars of assigned partitions to delivered forecasts."""

    _intake: FeedIntake
    _forecasting: Forecasting

    def __init__(
        self,
        settings: Settings,
        feed: Feed,
        sinks: Sequence[Sink],
        *,
        clock: Clock,
        random: Random,
        worker_factory: WorkerFactory | None = None,
    ) -> None:
        """worker_factory: makes the worker of each device; None starts processes."""
        super().__init__(settings, sinks, clock=clock, random=random)
        self._state_file = None
        self._intake = FeedIntake(feed, self._series_status)
        self._forecasting = Forecasting(settings, clock, self._wall, self.metrics, worker_factory)
        self._removed_series: asyncio.Queue[Series] = asyncio.Queue()

    async def _start(self) -> None:
        settings, forecasting = self.settings, self._forecasting
        identity = await forecasting.worker.start()
        tracker = self._tracker = self._intake.tracker = PartitionTracker(
            lambda request: forecasting.scheduler.submit(request),  # noqa: PLW0108 - made below
            self._removed_series.put_nowait,
            self._dead_letters.put,
            self._drain_in_flight,
            self._clock,
            self.metrics,
            lookback=settings.lookback,
            catch_up=settings.catch_up,
            degraded=settings.degraded,
        )
        self._series_status.track(lambda: tracker.series)
        forecasting.create_publisher(
            identity,
            self._outbox,
            is_followed=lambda _: True,
            on_published=self._series_status.record,
            record_outcomes=False,
        )
        # Batches take at most half of their deadline, so one fits into the revocation time-out.
        forecasting.create_scheduler(tracker, self._publish, max_deadline=_REVOKE_TIMEOUT_SECONDS)

    def _tasks(self) -> Iterable[Coroutine[Any, Any, None]]:
        yield from super()._tasks()
        yield self._track_deliveries()
        yield self._publish_removals()

    async def _finish(self, stop_began: float) -> None:
        self._forecasting.scheduler.cancel_waiting()
        await super()._finish(stop_began)
        self._tracker.mark_delivered(self._outbox.delivered_sequence)
        await self._intake.close()

    async def _publish(self, results: Sequence[ForecastResult]) -> Sequence[ForecastResult]:
        """Publish results of partitions that are still assigned; other members do the rest."""
        owned = [result for result in results if self._tracker.owns(result.request)]
        if not owned:
            return owned
        published = await self._forecasting.publisher.publish(owned)
        for result in owned:
            self._tracker.mark_published(result.request, self._outbox.last_sequence)
        return published

    async def _publish_removals(self) -> None:
        """Publish series that are not forecast any more; until cancelled."""
        while True:
            series = await self._removed_series.get()
            if self._tracker.removal_pending(series):
                await self._forecasting.publisher.retract([series.name])
                self._tracker.mark_published(series, self._outbox.last_sequence)

    async def _track_deliveries(self) -> None:
        while True:
            self._tracker.mark_delivered(self._outbox.delivered_sequence)
            await asyncio.sleep(_DELIVERY_POLL_SECONDS)

    async def _drain_in_flight(self) -> None:
        """Finish and deliver the current batch before partitions are revoked, within a time-out."""
        self._forecasting.scheduler.cancel_waiting()
        with suppress(TimeoutError):
            async with asyncio.timeout(_REVOKE_TIMEOUT_SECONDS):
                await self._forecasting.scheduler.drain()
                await self._outbox.drain(_REVOKE_TIMEOUT_SECONDS)
        self._tracker.mark_delivered(self._outbox.delivered_sequence)
