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
from kronos_stream.daemon.universe import REFRESH_SECONDS, resolve
from kronos_stream.daemon.worker import Worker
from kronos_stream.forecast.sink import Sink
from kronos_stream.market.clock import Clock, SystemClock
from kronos_stream.market.series import Series
from kronos_stream.market.source import Source, SourceError, VenueRefused

_log = structlog.get_logger()

_ASK_AGAIN_SECONDS = 5.0
_PRUNE_SECONDS = 600.0
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
        self.ready = asyncio.Event()
        """Set once the model is loaded and the venues are followed."""
        self._sources, self._sinks = dict(sources), list(sinks)
        self._clock, self._wall, self._random = clock, wall or SystemClock(), random
        self._watch = watch
        self._make_worker = worker or partial(Worker, standby=settings.standby)
        self._watchlist = settings.watchlist() if series is None else ()
        self._series: frozenset[Series] = frozenset(series or ())
        self._held: frozenset[Series] = frozenset()
        """What was followed when the state was left."""
        self._board = Board(clock)
        self._lost: dict[str, str] = {}
        self._stop = asyncio.Event()
        self._changing = asyncio.Lock()

    async def check(self) -> Identity:
        """Load the model and ask the venues for what is wanted, in place of :meth:`run`.

        Raises SettingsError and WorkerError for what the user can mend, SourceError where a venue
        does not answer.
        """
        async with AsyncExitStack() as stack:
            worker = self._make_worker(self.settings.plan(), self.metrics)
            stack.push_async_callback(worker.close)
            for source in self._sources.values():
                stack.push_async_callback(source.close)
            unknown = [line for venue in self._sources for line in await self._choose(venue)]
            if unknown:
                raise SettingsError(unknown)
            return await worker.start()

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
            self._held = frozenset(map(Series.parse, await self._state.followed()))
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
            found[f"source {venue}"] = self._lost.get(venue) or silent.get(venue, "")
        if not self.ready.is_set():
            found["start"] = "candles are not followed yet"
        return found

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
        self._watchlist = self.settings.watchlist()
        await self._follow_watchlist()

    async def follow(self, series: Collection[Series]) -> None:
        """Change the set of series, once :attr:`ready`; those that stay lose no bar.

        SettingsError: nothing changed; SourceError: nor then, and it may be tried again.
        """
        wanted = frozenset(series)
        async with self._changing:
            await self.ready.wait()
            strange = sorted({one.venue for one in wanted} - self._sources.keys())
            unknown = [f"{venue}: not among the venues at the start; restart" for venue in strange]
            if not unknown:
                new = wanted - self._series
                unknown = [
                    line for venue in self._sources for line in await self._unknown(venue, new)
                ]
            if unknown:
                raise SettingsError(unknown)
            gone, new = self._series - wanted, wanted - self._series
            self._series = wanted
            await self._desk.follow(wanted)
            self._point_sources()
            await self._say_what_is_gone()
        _log.info("series changed", added=len(new), removed=len(gone), series=len(wanted))

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
            asking = tasks.create_task(self._unknown_at_start())
        if unknown := asking.result():
            raise SettingsError(unknown)
        self._put_together(loading.result())
        await self._desk.start(self._series)
        await self._say_what_is_gone()

    def _put_together(self, identity: Identity) -> None:
        settings = self.settings
        press = self._press = Press(
            composer(settings.plan(), identity),
            self._outbox,
            self._clock,
            self._wall,
            follows=lambda series: series in self._series,
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
        self._point_sources()
        async with asyncio.TaskGroup() as tasks:
            desk = tasks.create_task(self._desk.run())
            refreshing = tasks.create_task(self._refresh())
            sources = [
                tasks.create_task(self._run_source(venue, source))
                for venue, source in self._sources.items()
                if venue not in self._lost
            ]
            self.ready.set()
            _log.info("following", series=len(self._series), venues=sorted(self._sources))
            stopped = tasks.create_task(self._stop.wait())
            ended = tasks.create_task(_all(sources))
            await asyncio.wait((stopped, ended), return_when=asyncio.FIRST_COMPLETED)
            self.ready.clear()
            if not self._stop.is_set():
                await self._unless_stopped(self.settled())
            for task in (stopped, ended, desk, refreshing, *sources):
                task.cancel()

    async def _run_source(self, venue: str, source: Source) -> None:
        try:
            await source.run(self._desk.intake(venue))
        except VenueRefused as error:
            self._lose(venue, error)

    async def _finish(self) -> None:
        """Forecast what is in hand and deliver, within the grace."""
        began = asyncio.get_running_loop().time()
        whole = await self._scheduler.finish(self.settings.stop_grace)
        await self._graveyard.flush()
        left = self.settings.stop_grace - (asyncio.get_running_loop().time() - began)
        waiting = await self._outbox.drain(max(0.0, left))
        _log.info("stopped", batch_finished=whole, undelivered=waiting)

    def _point_sources(self) -> None:
        for venue, source in self._sources.items():
            source.follow([one for one in self._series if one.venue == venue])

    async def _unknown_at_start(self) -> list[str]:
        """What no venue has, asked for as long as it takes; one that refuses us is lost."""
        lines = []
        for venue in self._sources:
            while True:
                try:
                    lines += await self._choose(venue)
                except VenueRefused as error:
                    self._lose(venue, error)
                except SourceError as error:
                    _log.warning("venue does not answer yet", venue=venue, why=str(error))
                    await self._clock.sleep(max(_ASK_AGAIN_SECONDS, error.retry_after))
                    continue
                break
        return lines

    async def _choose(self, venue: str) -> list[str]:
        """Settle what of the watchlist this venue is to serve; a line for each it does not have."""
        entries = [entry for entry in self._watchlist if entry.venue == venue]
        chosen = await resolve(entries, self._sources, self._held)
        self._series |= chosen
        return await self._unknown(venue, self._series)

    async def _follow_watchlist(self) -> None:
        await self.ready.wait()
        entries = [entry for entry in self._watchlist if entry.venue not in self._lost]
        lost = {one for one in self._series if one.venue in self._lost}
        await self.follow(lost | await resolve(entries, self._sources, self._series))

    async def _refresh(self) -> None:
        """Look daily what patterns stand for; until cancelled."""
        while True:
            await self._clock.sleep(REFRESH_SECONDS)
            if not any(entry.is_pattern for entry in self._watchlist):
                continue
            try:
                await self._follow_watchlist()
            except (SettingsError, SourceError) as error:
                _log.warning("symbols cannot be looked up; they stay", why=str(error))

    async def _say_what_is_gone(self) -> None:
        """Tell readers which series are followed no more, once it cannot be undone."""
        names = {one.name for one in self._series}
        if gone := sorted(await self._state.followed() - names):
            await self._press.retract(gone)
        await self._state.follow(names)

    async def _unknown(self, venue: str, series: Collection[Series]) -> list[str]:
        """A line for each of ``series`` that its venue, if it is this one, does not have."""
        asked = [one for one in series if one.venue == venue]
        if not asked:
            return []
        found = await self._sources[venue].unknown(asked)
        return [f"{one}: {why}" for one, why in sorted(found.items())]

    def _lose(self, venue: str, error: VenueRefused) -> None:
        """Go on without a venue that will not serve us; raise where it was the last."""
        self._lost[venue] = str(error)
        _log.error("venue refused us; its series stop here", venue=venue, why=str(error))
        if len(self._lost) == len(self._sources):
            raise error

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
