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

from kronos_stream.daemon import progress
from kronos_stream.daemon.crew import MakeWorker, Working, hire
from kronos_stream.daemon.desk import Desk
from kronos_stream.daemon.due import Due, Result
from kronos_stream.daemon.following import Following
from kronos_stream.daemon.job import Identity
from kronos_stream.daemon.metrics import Metrics
from kronos_stream.daemon.press import Graveyard, Press, composer
from kronos_stream.daemon.scheduler import Scheduler
from kronos_stream.daemon.settings import Settings
from kronos_stream.daemon.state import State
from kronos_stream.forecast.sink import Sink
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series
from kronos_stream.market.source import Source


class Daemon(Following):
    """One process's series, from candles to delivered forecasts."""

    _worker: Working

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
        watch: Callable[[Sequence[Result]], None] | None = None,
        worker: MakeWorker | None = None,
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
        self._watch = watch
        self._make_worker = worker

    async def check(self) -> tuple[Identity, int]:
        """Load the model and ask the venues for what is wanted, in place of :meth:`run`.

        Raises SettingsError and WorkerError for what the user can mend, SourceError where a venue
        does not answer. Returns who forecasts, and how many series.
        """
        async with AsyncExitStack() as stack:
            worker = hire(self.settings, self.metrics, self._make_worker)
            stack.push_async_callback(worker.close)
            for source in self._sources.values():
                stack.push_async_callback(source.close)
            await self._universe.check()
            return await worker.start(), len(self._universe.series)

    def checks(self) -> dict[str, str]:
        return {"worker": self._worker.healthy(), **super().checks()}

    async def settled(self) -> None:
        """Return once all that was taken in is forecast and delivered; what waits on time may."""
        await self._desk.settled()
        await self._scheduler.settled()
        await self._outbox.drain(inf)

    async def _open(self, stack: AsyncExitStack) -> State:
        state = await super()._open(stack)
        self._worker = hire(self.settings, self.metrics, self._make_worker)
        stack.push_async_callback(self._worker.close)
        return state

    def _steps(self) -> Sequence[Iterable[progress.Work]]:
        working = progress.forecasting(self._scheduler, self._worker, self.metrics)
        return (*super()._steps(), working)

    async def _work(self) -> None:
        if not await self._unless_stopped(self._start()):
            return
        async with asyncio.TaskGroup() as tasks:
            beside = [
                tasks.create_task(work)
                for work in (self._worker.run(), self._scheduler.run(), self._graveyard.run())
            ]
            await self._take_in()
            began = asyncio.get_running_loop().time()
            whole = await self._scheduler.finish(self.settings.stop_grace)
            await self._graveyard.flush()
            await self._deliver(began, whole=whole)
            for task in beside:
                task.cancel()

    async def _start(self) -> None:
        """Load the model, ask the venues whether they have what is asked for, load the state."""
        async with asyncio.TaskGroup() as tasks:  # where one fails, the other is not left running
            loading = tasks.create_task(self._worker.start())
            tasks.create_task(self._settle_universe())
        self._put_together(loading.result())
        await self._desk.start(self._universe.series)
        await self._say_what_is_gone()

    def _put_together(self, identity: Identity) -> None:
        settings = self.settings
        press = self._press = Press(
            composer(settings.plan(), identity),
            self._outbox,
            self._clock,
            self._wall,
            follows=lambda series: series in self._universe.series,
            told=self._board.told,
        )
        self._graveyard = Graveyard(self._outbox, self._wall)

        async def publish(results: Sequence[Result]) -> Sequence[Result]:
            told = await press.publish(results)
            if self._watch is not None:
                self._watch(told)
            return told

        self._desk = Desk(
            self._sources,
            self._state,
            self._take_due,
            self._clock,
            self._random,
            self.metrics,
            lookback=settings.lookback,
            catch_up=settings.catch_up,
            degraded=settings.degraded,
            bury=self._graveyard.bury,
        )
        self._board.look_at(lambda: self._desk.followed)
        self._scheduler = Scheduler(
            self._worker,
            self._desk.window,
            self._desk.awaited,
            publish,
            self._clock,
            self.metrics,
            catch_up=settings.catch_up,
            batch_wait=settings.batch_wait,
            batch_deadline=settings.batch_deadline,
        )

    def _take_due(self, due: Due) -> None:
        """The desk's word to the scheduler, which is made after it."""
        self._scheduler.due(due)

    async def _retract(self, series: Sequence[str]) -> None:
        await self._press.retract(series)
