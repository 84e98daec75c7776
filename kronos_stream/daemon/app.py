"""The daemon put together: sources, desk, scheduler, worker, outbox and sinks, from start to stop.

Two groups of tasks. The outer one delivers what is due; the inner one takes candles in and ends
first, so that what has been taken in can still be forecast and sent. A task that fails takes the
daemon down, loudly; the state file keeps what was not delivered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from math import inf
from random import Random
from typing import Any, Protocol

import structlog

from kronos_stream import __version__
from kronos_stream.daemon import progress
from kronos_stream.daemon.board import Board
from kronos_stream.daemon.desk import Desk
from kronos_stream.daemon.due import Due, Result
from kronos_stream.daemon.health import watch_loop_lag
from kronos_stream.daemon.http import Served
from kronos_stream.daemon.job import Identity, Plan
from kronos_stream.daemon.metrics import Metrics
from kronos_stream.daemon.outbox import Outbox
from kronos_stream.daemon.pages import Pages
from kronos_stream.daemon.press import Graveyard, Press, composer, refused
from kronos_stream.daemon.scheduler import Forecasting, Scheduler
from kronos_stream.daemon.settings import Settings, SettingsError
from kronos_stream.daemon.state import State
from kronos_stream.daemon.universe import ASK_AGAIN_SECONDS, Universe
from kronos_stream.daemon.worker import Worker
from kronos_stream.forecast.sink import Sink
from kronos_stream.market.clock import Clock, SystemClock
from kronos_stream.market.series import Series
from kronos_stream.market.source import Source, SourceError, VenueRefused

_log = structlog.get_logger()

_REFRESH_SECONDS = 86_400.0
"""How often venues are asked anew what patterns stand for."""
_REFRESH_AGAIN_SECONDS = 600.0
_PRUNE_SECONDS = 600.0
_START_SECONDS = 1_800.0
"""For the model, the venues and the bars in the state file."""
_BARS_FACTOR = 4
"""Bars kept per series, in lookbacks."""
_OUTCOMES_MS = 3 * 86_400_000
"""How long outcomes are kept: at one a second and series they are many."""


class Working(Forecasting, Protocol):
    """What the daemon needs of a worker."""

    def healthy(self) -> str: ...

    async def start(self) -> Identity: ...

    async def run(self) -> None: ...

    async def close(self) -> None: ...


class Daemon:
    """One process's series, from candles to delivered forecasts."""

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
        worker: Callable[[Plan, Metrics], Working] | None = None,
    ) -> None:
        """Nothing is opened yet.

        clock: the market's time. series: what to follow; left out, what the settings say. wall:
        what records are stamped with. watch: told every result, once it is durable.
        worker: makes what forecasts; left out, a process.
        """
        self.settings = settings
        self.metrics = metrics or Metrics()
        self.metrics.build_info.labels(__version__, settings.role).set(1)
        self.metrics.expect(venues=sources)
        self.ready = asyncio.Event()
        """Set once the model is loaded and the venues are followed."""
        self.running = asyncio.Event()
        """Set once the state file is ours and tasks are supervised, whoever may be away."""
        self.progress = progress.Progress()
        self._sources, self._sinks = dict(sources), list(sinks)
        self._clock, self._wall, self._random = clock, wall or SystemClock(), random
        self._watch = watch
        self._make_worker = worker or partial(Worker, standby=settings.standby)
        watchlist = settings.watchlist() if series is None else ()
        self._universe = Universe(watchlist, series or (), self._sources, clock)
        self._board = Board(clock)
        self._stop = asyncio.Event()
        self._changing = asyncio.Lock()

    async def check(self) -> tuple[Identity, int]:
        """Load the model and ask the venues for what is wanted, in place of :meth:`run`.

        Raises SettingsError and WorkerError for what the user can mend, SourceError where a venue
        does not answer. Returns who forecasts, and how many series.
        """
        async with AsyncExitStack() as stack:
            worker = self._make_worker(self.settings.plan(), self.metrics)
            stack.push_async_callback(worker.close)
            for source in self._sources.values():
                stack.push_async_callback(source.close)
            await self._universe.check()
            return await worker.start(), len(self._universe.series)

    def stop(self) -> None:
        """Take in no more, finish the batch in hand, deliver, and let :meth:`run` return."""
        self._stop.set()

    async def run(self) -> None:
        """Work until :meth:`stop`, or until every source has ended.

        Raises SettingsError, StateError or WorkerError for what the user can mend.
        """
        settings = self.settings
        async with AsyncExitStack() as stack:
            self._state = await State.open(settings.state_file)
            stack.push_async_callback(self._state.close)
            self._worker = self._make_worker(settings.plan(), self.metrics)
            stack.push_async_callback(self._worker.close)
            for source in self._sources.values():
                stack.push_async_callback(source.close)
            self._outbox = Outbox(
                self._state,
                self._sinks,
                self._wall,
                self._random,
                self.metrics,
                max_age_seconds=settings.outbox_max_age,
                bury=lambda sink, refusal: refused(sink, refusal, self._wall.now()),
            )
            pages = Pages(
                self.metrics, self.checks, self._board, self._clock, token=settings.http.token
            )
            await stack.enter_async_context(Served(settings.http, pages))
            try:
                async with asyncio.TaskGroup() as tasks:
                    sending = tasks.create_task(self._outbox.run())
                    lag = tasks.create_task(watch_loop_lag(self.metrics))
                    pruning = tasks.create_task(self._prune())
                    self.progress.watch(
                        progress.starting(_START_SECONDS),
                        progress.delivering(self._outbox.deliveries.items()),
                    )
                    self.running.set()
                    await self._forecast_until_stopped()
                    for task in (sending, lag, pruning):
                        task.cancel()
            except* Exception as failures:  # noqa: BLE001 - whatever it was, it ends the daemon
                raise _first(failures) from None

    def checks(self) -> dict[str, str]:
        """What readiness hangs on: what it is → why it is not so, empty if it is."""
        found = {f"sink {name}": why for name, why in self._outbox.healthy().items()}
        found["worker"] = self._worker.healthy()
        silent = self._board.silent(self._sources)
        for venue in self._sources:
            found[f"source {venue}"] = self._universe.waits(venue) or silent.get(venue, "")
        if not self.ready.is_set():
            found["start"] = "candles are not followed yet"
        return found

    @property
    def followed(self) -> int:
        """How many series."""
        return len(self._universe.series)

    @property
    def next_alarm(self) -> int | None:
        """When there is something to be done even if nothing comes, UTC ms; once :attr:`ready`."""
        return self._desk.next_alarm

    async def settled(self) -> None:
        """Return once all that was taken in is forecast and delivered; what waits on time may."""
        await self._desk.settled()
        await self._scheduler.settled()
        await self._outbox.drain(inf)

    async def reload(self) -> None:
        """Follow what the settings want now, once :attr:`ready`; raises as :meth:`follow`."""
        async with self._changing:
            await self.ready.wait()
            # Read only now: where one change waits for another, the last one counts.
            watchlist = self.settings.watchlist()
            await self._change(await self._universe.today(watchlist))
            self._universe.watchlist = watchlist

    async def follow(self, series: Collection[Series]) -> None:
        """Change the set of series, once :attr:`ready`; those that stay lose no bar.

        SettingsError: nothing changed; SourceError: nor then, and it may be tried again.
        """
        async with self._changing:
            await self.ready.wait()
            await self._change(frozenset(series))

    async def _forecast_until_stopped(self) -> None:
        if not await self._unless_stopped(self._start()):
            return
        async with asyncio.TaskGroup() as tasks:
            working = tasks.create_task(self._worker.run())
            scheduling = tasks.create_task(self._scheduler.run())
            burying = tasks.create_task(self._graveyard.run())
            await self._take_in()
            await self._finish()
            for task in (working, scheduling, burying):
                task.cancel()

    async def _start(self) -> None:
        """Load the model, ask the venues whether they have what is asked for, load the state."""
        async with asyncio.TaskGroup() as tasks:  # where one fails, the other is not left running
            loading = tasks.create_task(self._worker.start())
            held = map(Series.parse, await self._state.followed())
            tasks.create_task(self._universe.settle(frozenset(held)))
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

        async def publish(results: Sequence[Result]) -> None:
            await press.publish(results)
            if self._watch is not None:
                self._watch(results)

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

    async def _take_in(self) -> None:
        """Follow the venues until told to stop, or until their data end."""
        self._universe.point_sources()
        async with asyncio.TaskGroup() as tasks:
            desk = tasks.create_task(self._desk.run())
            refreshing = tasks.create_task(self._refresh())
            welcoming = tasks.create_task(self._welcome())
            sources = [
                tasks.create_task(self._run_source(venue, source))
                for venue, source in self._sources.items()
                if venue not in self._universe.lost
            ]
            self.progress.watch(
                progress.taking_in(self._desk, self._clock),
                progress.forecasting(self._scheduler, self._worker, self.metrics),
                progress.delivering(self._outbox.deliveries.items()),
            )
            self.ready.set()
            _log.info("following", series=len(self._universe.series), venues=sorted(self._sources))
            stopped = tasks.create_task(self._stop.wait())
            ended = tasks.create_task(_all(sources))
            await asyncio.wait((stopped, ended), return_when=asyncio.FIRST_COMPLETED)
            self.ready.clear()
            if not self._stop.is_set():
                await self._unless_stopped(self.settled())
            for task in (stopped, ended, desk, refreshing, welcoming, *sources):
                task.cancel()

    async def _run_source(self, venue: str, source: Source) -> None:
        try:
            await source.run(self._desk.intake(venue))
        except VenueRefused as error:
            self._universe.lose(venue, error)

    async def _finish(self) -> None:
        """Forecast what is in hand and deliver, within the grace."""
        began = asyncio.get_running_loop().time()
        whole = await self._scheduler.finish(self.settings.stop_grace)
        await self._graveyard.flush()
        left = self.settings.stop_grace - (asyncio.get_running_loop().time() - began)
        waiting = await self._outbox.drain(max(0.0, left))
        _log.info("stopped", batch_finished=whole, undelivered=waiting)

    async def _change(self, wanted: frozenset[Series]) -> None:
        """See :meth:`follow`; one at a time."""
        universe = self._universe
        await universe.refuse_unknown(wanted)
        gone, new = universe.series - wanted, wanted - universe.series
        universe.series = wanted
        await self._desk.follow(wanted)
        universe.point_sources()
        await self._say_what_is_gone()
        _log.info("series changed", added=len(new), removed=len(gone), series=len(wanted))

    async def _refresh(self) -> None:
        """Look daily what patterns stand for; until cancelled."""
        pause = _REFRESH_SECONDS
        while True:
            await self._clock.sleep(pause)
            pause = _REFRESH_SECONDS
            if not any(entry.is_pattern for entry in self._universe.watchlist):
                continue
            try:
                async with self._changing:
                    await self._change(await self._universe.today(self._universe.watchlist))
            except (SettingsError, SourceError) as error:
                _log.warning("symbols cannot be looked up; they stay", why=str(error))
                pause = _REFRESH_AGAIN_SECONDS

    async def _welcome(self) -> None:
        """Follow venues that did not answer at the start, once they do; until there is none."""
        universe = self._universe
        while universe.absent:
            await self._clock.sleep(ASK_AGAIN_SECONDS)
            for venue in sorted(universe.absent):
                try:
                    async with self._changing:
                        wanted = await universe.welcome(venue)
                        universe.absent.discard(venue)
                        await self._change(wanted)
                    universe.trouble.pop(venue, None)
                except VenueRefused as error:
                    universe.absent.discard(venue)
                    universe.lose(venue, error)
                except SourceError as error:
                    universe.absent.add(venue)
                    universe.trouble[venue] = str(error)
                except SettingsError as error:
                    universe.absent.discard(venue)
                    universe.trouble[venue] = str(error)
                    _log.error("symbols of a venue are not followed", venue=venue, why=str(error))

    async def _say_what_is_gone(self) -> None:
        """Tell readers which series are followed no more, once it cannot be undone."""
        names = {one.name for one in self._universe.series}
        # What a venue should have said that is lost, or does not answer yet, is not known.
        former = await self._state.followed()
        away = self._universe.lost.keys() | self._universe.absent
        names |= {name for name in former if Series.parse(name).venue in away}
        if gone := sorted(former - names):
            await self._press.retract(gone)
        await self._state.follow(names)

    async def _prune(self) -> None:
        while True:
            await asyncio.sleep(_PRUNE_SECONDS)
            kept = self._wall.now() - _OUTCOMES_MS
            await self._state.prune(_BARS_FACTOR * self.settings.lookback, kept)

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Run ``work``; given up, and False, when told to stop before it is done."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
                return True
            return False
        finally:
            await _cancelled(task, stop)


async def _all(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Return once all are done, however."""
    await asyncio.wait(tasks)


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _first(failures: BaseExceptionGroup[Exception]) -> Exception:
    """What failed first: the groups around it say nothing to a reader."""
    failure: BaseException = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    assert isinstance(failure, Exception)  # noqa: S101 - a group of them holds nothing else
    return failure
