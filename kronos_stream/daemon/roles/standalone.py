"""Role ``all``: sources, desk, scheduler, worker and outbox in one process, without a broker.

What was taken in when it is told to stop is still forecast and sent; the state file keeps what
was not delivered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from math import inf
from random import Random

from kronos_stream.daemon.config.settings import Settings
from kronos_stream.daemon.delivery.publisher import (
    DeadLetterQueue,
    ForecastPublisher,
    build_composer,
)
from kronos_stream.daemon.inference.pool import InferenceBackend, WorkerFactory, create_backend
from kronos_stream.daemon.inference.protocol import ModelIdentity
from kronos_stream.daemon.intake.pipeline import IntakePipeline
from kronos_stream.daemon.requests import ForecastRequest, ForecastResult
from kronos_stream.daemon.roles.venue import VenueRole
from kronos_stream.daemon.scheduling.scheduler import Scheduler
from kronos_stream.daemon.status import watchdog
from kronos_stream.daemon.storage.state import State
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.sink import Sink
from kronos_stream.interfaces.source import Source
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series


class StandaloneRole(VenueRole):
    """One process's series, from candles to delivered forecasts."""

    _worker: InferenceBackend

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
        metrics: Metrics | None = None,
        on_results: Callable[[Sequence[ForecastResult]], None] | None = None,
        worker_factory: WorkerFactory | None = None,
    ) -> None:
        """Nothing is opened yet.

        clock: the market's time. series: what to follow; left out, what the settings say. wall:
        what records are stamped with. watch: told every result, once it is durable.
        worker: makes what forecasts; left out, a process for each device.
        """
        super().__init__(
            settings,
            sources,
            sinks,
            clock=clock,
            random=random,
            series=series,
            wall=wall,
            metrics=metrics,
        )
        self._on_results = on_results
        self._worker_factory = worker_factory

    async def check(self) -> tuple[ModelIdentity, int]:
        """Load the model and ask the venues for what is wanted, in place of :meth:`run`.

        Raises SettingsError and WorkerError for what the user can mend, SourceError where a venue
        does not answer. Returns who forecasts, and how many series.
        """
        async with AsyncExitStack() as stack:
            worker = create_backend(self.settings, self.metrics, self._worker_factory)
            stack.push_async_callback(worker.close)
            for source in self._sources.values():
                stack.push_async_callback(source.close)
            await self._universe.check()
            return await worker.start(), len(self._universe.series)

    def readiness(self) -> dict[str, str]:
        return {"worker": self._worker.problem(), **super().readiness()}

    async def drain(self) -> None:
        """Return once all that was taken in is forecast and delivered; what waits on time may."""
        await self._pipeline.drain()
        await self._scheduler.drain()
        await self._outbox.drain(inf)

    async def _open(self, stack: AsyncExitStack) -> State:
        state = await super()._open(stack)
        self._worker = create_backend(self.settings, self.metrics, self._worker_factory)
        stack.push_async_callback(self._worker.close)
        return state

    def _stall_checks(self) -> Sequence[Iterable[watchdog.StallCheck]]:
        working = watchdog.forecast_checks(self._scheduler, self._worker, self.metrics)
        return (*super()._stall_checks(), working)

    async def _work(self) -> None:
        if not await self._run_until_stopped(self._start()):
            return
        async with asyncio.TaskGroup() as tasks:
            beside = [
                tasks.create_task(work)
                for work in (self._worker.run(), self._scheduler.run(), self._dead_letters.run())
            ]
            await self._run_intake()
            began = asyncio.get_running_loop().time()
            whole = await self._scheduler.finish(self.settings.stop_grace)
            await self._dead_letters.flush()
            await self._drain_outbox(began, batch_finished=whole)
            for task in beside:
                task.cancel()

    async def _start(self) -> None:
        """Load the model, ask the venues whether they have what is asked for, load the state."""
        async with asyncio.TaskGroup() as tasks:  # where one fails, the other is not left running
            loading = tasks.create_task(self._worker.start())
            tasks.create_task(self._resolve_universe())
        self._build(loading.result())
        await self._pipeline.start(self._universe.series)
        await self._retract_removed_series()

    def _build(self, identity: ModelIdentity) -> None:
        settings = self.settings
        press = self._publisher = ForecastPublisher(
            build_composer(settings.forecast_config(), identity),
            self._outbox,
            self._clock,
            self._wall,
            is_followed=lambda series: series in self._universe.series,
            on_published=self._series_status.record,
        )
        self._dead_letters = DeadLetterQueue(self._outbox, self._wall)

        async def publish(results: Sequence[ForecastResult]) -> Sequence[ForecastResult]:
            told = await press.publish(results)
            if self._on_results is not None:
                self._on_results(told)
            return told

        self._pipeline = IntakePipeline(
            self._sources,
            self._state,
            self._submit,
            self._clock,
            self._random,
            self.metrics,
            lookback=settings.lookback,
            catch_up=settings.catch_up,
            degraded=settings.degraded,
            dead_letter=self._dead_letters.put,
        )
        self._series_status.track(lambda: self._pipeline.series_states)
        self._scheduler = Scheduler(
            self._worker,
            self._pipeline.window,
            self._pipeline.outstanding_bars,
            publish,
            self._clock,
            self.metrics,
            catch_up=settings.catch_up,
            batch_wait=settings.batch_wait,
            batch_deadline=settings.batch_deadline,
        )

    def _submit(self, request: ForecastRequest) -> None:
        """The desk's word to the scheduler, which is made after it."""
        self._scheduler.submit(request)

    async def _retract(self, series: Sequence[str]) -> None:
        await self._publisher.retract(series)
