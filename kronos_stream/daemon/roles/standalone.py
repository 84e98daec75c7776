"""Role ``all``: venues, model and sinks in one process, without a broker in between.

A stop finishes the current batch and delivers it; the state file keeps what was not delivered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from random import Random

from kronos_stream.daemon.config.settings import Settings
from kronos_stream.daemon.inference.backend import WorkerFactory
from kronos_stream.daemon.requests import ForecastResult
from kronos_stream.daemon.roles.base import Role
from kronos_stream.daemon.roles.forecasting import Forecasting
from kronos_stream.daemon.roles.venue_intake import VenueIntake
from kronos_stream.interfaces.sink import Envelope, Sink
from kronos_stream.interfaces.source import Source
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series


class StandaloneRole(Role):
    """Everything from the candles of venues to delivered forecasts."""

    _intake: VenueIntake
    _forecasting: Forecasting

    def __init__(
        self,
        settings: Settings,
        sources: Mapping[str, Source],
        sinks: Sequence[Sink],
        *,
        clock: Clock,
        random: Random,
        series: Collection[Series] | None = None,
        wall: Clock | None = None,
        on_results: Callable[[Sequence[ForecastResult]], None] | None = None,
        worker_factory: WorkerFactory | None = None,
    ) -> None:
        """Open nothing yet.

        clock: time of the market. wall: time that records are stamped with.
        series: followed in place of those of the settings.
        on_results: called with all results once they are durable.
        worker_factory: makes the worker of each device; None starts processes.
        """
        super().__init__(settings, sinks, clock=clock, random=random, wall=wall)
        self._intake = VenueIntake(
            settings,
            sources,
            self._series_status,
            self.metrics,
            clock=clock,
            wall=self._wall,
            random=random,
            series=series,
        )
        self._forecasting = Forecasting(settings, clock, self._wall, self.metrics, worker_factory)
        self._on_results = on_results

    @property
    def next_timer(self) -> int | None:
        """Time at which something is due although no candle arrives, UTC ms; once ready."""
        return self._intake.pipeline.next_timer

    async def drain(self) -> None:
        await self._intake.pipeline.drain()
        await super().drain()

    async def _start(self) -> None:
        intake, forecasting = self._intake, self._forecasting
        async with asyncio.TaskGroup() as tasks:  # an error in one cancels the other
            loading = tasks.create_task(forecasting.worker.start())
            tasks.create_task(intake.resolve(self._state))
        forecasting.create_publisher(
            loading.result(),
            self._outbox,
            is_followed=lambda series: series in intake.universe.series,
            on_published=self._on_published,
            record_outcomes=True,
        )
        forecasting.create_scheduler(intake.saved_bars, forecasting.publisher.publish)
        await intake.start(
            forecasting.scheduler.submit, self._dead_letters.put, forecasting.publisher.retract
        )

    def _on_published(
        self, results: Sequence[ForecastResult], messages: Sequence[Envelope]
    ) -> None:
        self._series_status.record(results, messages)
        if self._on_results is not None:
            self._on_results(results)
