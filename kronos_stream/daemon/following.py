"""The roles that follow venues: sources and desk, and what happens when the series change."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from random import Random
from typing import Any

import structlog

from kronos_stream.daemon import progress
from kronos_stream.daemon.desk import Desk
from kronos_stream.daemon.metrics import Metrics
from kronos_stream.daemon.role import Role
from kronos_stream.daemon.settings import Settings, SettingsError
from kronos_stream.daemon.state import State
from kronos_stream.daemon.universe import ASK_AGAIN_SECONDS, Universe
from kronos_stream.forecast.sink import Sink
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series
from kronos_stream.market.source import Source, SourceError, VenueRefused

_log = structlog.get_logger()

_REFRESH_SECONDS = 86_400.0
"""How often venues are asked anew what patterns stand for."""
_REFRESH_AGAIN_SECONDS = 600.0
_PRUNE_SECONDS = 600.0
_BARS_FACTOR = 4
"""Bars kept per series, in lookbacks."""
_OUTCOMES_MS = 3 * 86_400_000
"""How long outcomes are kept: at one a second and series they are many."""


class Following(Role):
    """Takes in the candles of venues; what becomes of closed bars is each such role's own."""

    _desk: Desk

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
    ) -> None:
        """series: what to follow; left out, what the settings say. The rest as of a Role."""
        super().__init__(settings, sinks, clock=clock, random=random, wall=wall, metrics=metrics)
        self.metrics.expect(venues=sources)
        self._sources = dict(sources)
        watchlist = settings.watchlist() if series is None else ()
        patient = settings.login_refused == "retry"
        self._universe = Universe(watchlist, series or (), self._sources, clock, patient=patient)
        self._changing = asyncio.Lock()

    def checks(self) -> dict[str, str]:
        found = super().checks()
        silent = self._board.silent(self._sources)
        for venue in self._sources:
            found[f"source {venue}"] = self._universe.waits(venue) or silent.get(venue, "")
        return found

    @property
    def followed(self) -> int:
        """How many series."""
        return len(self._universe.series)

    @property
    def next_alarm(self) -> int | None:
        """When there is something to be done even if nothing comes, UTC ms; once :attr:`ready`."""
        return self._desk.next_alarm

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

    @abstractmethod
    async def settled(self) -> None:
        """Return once all that was taken in is worked off; what waits on time may."""

    @abstractmethod
    async def _retract(self, series: Sequence[str]) -> None:
        """Tell readers that these series are not followed any more; durable on return."""

    async def _open(self, stack: AsyncExitStack) -> State:
        state = await State.open(self.settings.state_file)
        stack.push_async_callback(state.close)
        for source in self._sources.values():
            stack.push_async_callback(source.close)
        return state

    def _upkeep(self) -> Sequence[Coroutine[Any, Any, None]]:
        return (self._prune(),)

    def _steps(self) -> Sequence[Iterable[progress.Work]]:
        """What has to get on while candles are followed."""
        return (
            progress.taking_in(self._desk, self._clock),
            progress.delivering(self._outbox.deliveries.items()),
        )

    async def _settle_universe(self) -> None:
        """Find out what there is to follow; what was followed before counts."""
        held = map(Series.parse, await self._state.followed())
        await self._universe.settle(frozenset(held))

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
            self.progress.watch(*self._steps())
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
            await self._retract(gone)
        await self._state.follow(names)

    async def _prune(self) -> None:
        while True:
            await asyncio.sleep(_PRUNE_SECONDS)
            kept = self._wall.now() - _OUTCOMES_MS
            await self._state.prune(_BARS_FACTOR * self.settings.lookback, kept)


async def _all(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Return once all are done, however."""
    await asyncio.wait(tasks)
