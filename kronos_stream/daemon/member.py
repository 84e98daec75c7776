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

from kronos_stream.daemon import progress
from kronos_stream.daemon.allotment import Allotment
from kronos_stream.daemon.crew import MakeWorker, Working, hire
from kronos_stream.daemon.due import Due, Result
from kronos_stream.daemon.job import Identity
from kronos_stream.daemon.metrics import Metrics
from kronos_stream.daemon.press import Graveyard, Press, composer
from kronos_stream.daemon.role import Role
from kronos_stream.daemon.scheduler import Scheduler
from kronos_stream.daemon.settings import Settings
from kronos_stream.daemon.state import State
from kronos_stream.forecast.sink import Sink
from kronos_stream.market.clock import Clock
from kronos_stream.market.contexts import Window
from kronos_stream.market.feed import Feed
from kronos_stream.market.series import Series

_log = structlog.get_logger()

_GIVE_UP_SECONDS = 20.0
"""For the batch in hand when parts are taken from us; the group waits for us meanwhile."""

_LOOK_SECONDS = 0.05


class Member(Role):
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
        worker: MakeWorker | None = None,
    ) -> None:
        """As of a Role.

        worker: makes what forecasts; left out, a process for each device.
        """
        super().__init__(settings, sinks, clock=clock, random=random, wall=wall, metrics=metrics)
        self._feed, self._make_worker = feed, worker
        self._retracted: asyncio.Queue[Series] = asyncio.Queue()

    async def check(self) -> Identity:
        """Load the model, in place of :meth:`run`. Raises WorkerError."""
        worker = hire(self.settings, self.metrics, self._make_worker)
        try:
            return await worker.start()
        finally:
            await worker.close()

    def checks(self) -> dict[str, str]:
        found = {"worker": self._worker.healthy(), **super().checks()}
        found["candles"] = self._feed.problem
        if self.ready.is_set():
            found["candles"] = found["candles"] or self._allotment.unready
            # Whoever works off what is old hears nothing new, and is no less ready for that.
            idle = not self._allotment.behind
            venues = {series.venue for series in self._allotment.lines if idle}
            found |= {f"source {one}": why for one, why in self._board.silent(venues).items()}
        return found

    @property
    def followed(self) -> int:
        """How many series."""
        return len(self._allotment.lines) if self.ready.is_set() else 0

    async def _open(self, stack: AsyncExitStack) -> State:
        state = await State.open(None)
        stack.push_async_callback(state.close)
        self._worker: Working = hire(self.settings, self.metrics, self._make_worker)
        stack.push_async_callback(self._worker.close)
        stack.push_async_callback(self._feed.close)
        return state

    def _steps(self) -> Sequence[Iterable[progress.Work]]:
        return (
            progress.forecasting(self._scheduler, self._worker, self.metrics),
            progress.delivering(self._outbox.deliveries.items()),
            progress.reading(self._feed),
        )

    async def _work(self) -> None:
        if not await self._unless_stopped(self._start()):
            return
        async with asyncio.TaskGroup() as tasks:
            beside = [
                tasks.create_task(work)
                for work in (
                    self._worker.run(),
                    self._scheduler.run(),
                    self._graveyard.run(),
                    self._watch_delivery(),
                    self._retract(),
                )
            ]
            reading = tasks.create_task(self._feed.run(self._allotment))
            self.progress.watch(*self._steps())
            self.ready.set()
            _log.info("reads candles as one of a group")
            await self._stop.wait()
            self.ready.clear()
            began = asyncio.get_running_loop().time()
            reading.cancel()
            await asyncio.wait([reading])
            self._scheduler.withdraw()
            whole = await self._scheduler.finish(self.settings.stop_grace)
            await self._graveyard.flush()
            await self._deliver(began, whole=whole)
            self._allotment.delivered(self._outbox.through)
            await self._feed.close()
            for task in beside:
                task.cancel()

    async def _start(self) -> None:
        identity = await self._worker.start()
        settings = self.settings
        self._graveyard = Graveyard(self._outbox, self._wall)
        self._allotment = Allotment(
            self._take_due,
            self._retracted.put_nowait,
            self._graveyard.bury,
            self._give_up,
            self._clock,
            self.metrics,
            lookback=settings.lookback,
            catch_up=settings.catch_up,
            degraded=settings.degraded,
        )
        self._board.look_at(lambda: self._allotment.lines)
        self._press = Press(
            composer(settings.plan(), identity),
            self._outbox,
            self._clock,
            self._wall,
            follows=lambda _: True,
            told=self._board.told,
            remembers=False,
        )
        self._scheduler = Scheduler(
            self._worker,
            self._window,
            self._allotment.awaited,
            self._publish,
            self._clock,
            self.metrics,
            catch_up=settings.catch_up,
            batch_wait=settings.batch_wait,
            batch_deadline=settings.batch_deadline,
            longest=_GIVE_UP_SECONDS,  # batches are sized to half of it
        )

    # -- from due bars to delivered forecasts ----------------------------------------------

    def _take_due(self, due: Due) -> None:
        """The allotment's word to the scheduler, which is made after it."""
        self._scheduler.due(due)

    async def _window(self, due: Due) -> Window | None:
        return self._allotment.window(due)

    async def _publish(self, results: Sequence[Result]) -> Sequence[Result]:
        """Put forecasts into the outbox; what was taken from us meanwhile is somebody else's."""
        ours = [result for result in results if self._allotment.holds(result.due)]
        if not ours:
            return ours
        told = await self._press.publish(ours)
        for result in ours:
            self._allotment.handed(result.due, self._outbox.newest)
        return told

    async def _retract(self) -> None:
        """Tell readers of series that are given up; until cancelled."""
        while True:
            series = await self._retracted.get()
            if self._allotment.owes(series):
                await self._press.retract([series.name])
                self._allotment.handed(series, self._outbox.newest)

    async def _watch_delivery(self) -> None:
        """See what is delivered, until cancelled."""
        while True:
            self._allotment.delivered(self._outbox.through)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _give_up(self) -> None:
        """Parts are about to be taken: finish and deliver the batch in hand, within a while."""
        self._scheduler.withdraw()
        with suppress(TimeoutError):
            async with asyncio.timeout(_GIVE_UP_SECONDS):
                await self._scheduler.settled()
                await self._outbox.drain(_GIVE_UP_SECONDS)
        self._allotment.delivered(self._outbox.through)
