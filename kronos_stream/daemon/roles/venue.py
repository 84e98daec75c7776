"""The roles that follow venues: sources and desk, and what happens when the series change."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from random import Random
from typing import Any

import structlog

from kronos_stream.daemon.config.settings import Settings, SettingsError
from kronos_stream.daemon.intake.pipeline import IntakePipeline
from kronos_stream.daemon.intake.universe import RETRY_SECONDS, Universe
from kronos_stream.daemon.roles.base import Role
from kronos_stream.daemon.status import watchdog
from kronos_stream.daemon.storage.state import State
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.sink import Sink
from kronos_stream.interfaces.source import Source, SourceError, VenueRefused
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_log = structlog.get_logger()

_REFRESH_SECONDS = 86_400.0
"""How often venues are asked anew what patterns stand for."""
_REFRESH_RETRY_SECONDS = 600.0
_PRUNE_SECONDS = 600.0
_RETAINED_LOOKBACKS = 4
"""Bars kept per series, in lookbacks."""
_OUTCOME_RETENTION_MS = 3 * 86_400_000
"""How long outcomes are kept: at one a second and series they are many."""


class VenueRole(Role):
    """Takes in the candles of venues; what becomes of closed bars is each such role's own."""

    _pipeline: IntakePipeline

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
        self.metrics.initialise_labels(venues=sources)
        self._sources = dict(sources)
        watchlist = settings.watchlist() if series is None else ()
        patient = settings.login_refused == "retry"
        self._universe = Universe(
            watchlist, series or (), self._sources, clock, retry_login=patient
        )
        self._change_lock = asyncio.Lock()

    def readiness(self) -> dict[str, str]:
        found = super().readiness()
        silent = self._series_status.silent_venues(self._sources)
        for venue in self._sources:
            found[f"source {venue}"] = self._universe.venue_problem(venue) or silent.get(venue, "")
        return found

    @property
    def series_count(self) -> int:
        """How many series."""
        return len(self._universe.series)

    @property
    def next_timer(self) -> int | None:
        """When there is something to be done even if nothing comes, UTC ms; once :attr:`ready`."""
        return self._pipeline.next_timer

    async def reload(self) -> None:
        """Follow what the settings want now, once :attr:`ready`; raises as :meth:`follow`."""
        async with self._change_lock:
            await self.ready.wait()
            # Read only now: where one change waits for another, the last one counts.
            watchlist = self.settings.watchlist()
            await self._change_series(await self._universe.resolve_watchlist(watchlist))
            self._universe.watchlist = watchlist

    async def follow(self, series: Collection[Series]) -> None:
        """Change the set of series, once :attr:`ready`; those that stay lose no bar.

        SettingsError: nothing changed; SourceError: nor then, and it may be tried again.
        """
        async with self._change_lock:
            await self.ready.wait()
            await self._change_series(frozenset(series))

    @abstractmethod
    async def drain(self) -> None:
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

    def _background_tasks(self) -> Sequence[Coroutine[Any, Any, None]]:
        return (self._prune(),)

    def _stall_checks(self) -> Sequence[Iterable[watchdog.StallCheck]]:
        """What has to get on while candles are followed."""
        return (
            watchdog.intake_checks(self._pipeline, self._clock),
            watchdog.delivery_checks(self._outbox.queues.items()),
        )

    async def _resolve_universe(self) -> None:
        """Find out what there is to follow; what was followed before counts."""
        held = map(Series.parse, await self._state.followed_series())
        await self._universe.resolve_initial(frozenset(held))

    async def _run_intake(self) -> None:
        """Follow the venues until told to stop, or until their data end."""
        self._universe.update_sources()
        async with asyncio.TaskGroup() as tasks:
            desk = tasks.create_task(self._pipeline.run())
            refreshing = tasks.create_task(self._refresh())
            welcoming = tasks.create_task(self._retry_pending_venues())
            sources = [
                tasks.create_task(self._run_source(venue, source))
                for venue, source in self._sources.items()
                if venue not in self._universe.dropped_venues
            ]
            self.watchdog.set_checks(*self._stall_checks())
            self.ready.set()
            _log.info("following", series=len(self._universe.series), venues=sorted(self._sources))
            stopped = tasks.create_task(self._stop.wait())
            ended = tasks.create_task(_wait_all(sources))
            await asyncio.wait((stopped, ended), return_when=asyncio.FIRST_COMPLETED)
            self.ready.clear()
            if not self._stop.is_set():
                await self._run_until_stopped(self.drain())
            for task in (stopped, ended, desk, refreshing, welcoming, *sources):
                task.cancel()

    async def _run_source(self, venue: str, source: Source) -> None:
        try:
            await source.run(self._pipeline.callbacks(venue))
        except VenueRefused as error:
            self._universe.drop_venue(venue, error)

    async def _change_series(self, wanted: frozenset[Series]) -> None:
        """See :meth:`follow`; one at a time."""
        universe = self._universe
        await universe.validate_change(wanted)
        gone, new = universe.series - wanted, wanted - universe.series
        universe.series = wanted
        await self._pipeline.follow(wanted)
        universe.update_sources()
        await self._retract_removed_series()
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
                async with self._change_lock:
                    await self._change_series(
                        await self._universe.resolve_watchlist(self._universe.watchlist)
                    )
            except (SettingsError, SourceError) as error:
                _log.warning("symbols cannot be looked up; they stay", why=str(error))
                pause = _REFRESH_RETRY_SECONDS

    async def _retry_pending_venues(self) -> None:
        """Follow venues that did not answer at the start, once they do; until there is none."""
        universe = self._universe
        while universe.pending_venues:
            await self._clock.sleep(RETRY_SECONDS)
            for venue in sorted(universe.pending_venues):
                try:
                    async with self._change_lock:
                        wanted = await universe.resolve_pending(venue)
                        universe.pending_venues.discard(venue)
                        await self._change_series(wanted)
                    universe.venue_errors.pop(venue, None)
                except VenueRefused as error:
                    universe.pending_venues.discard(venue)
                    universe.drop_venue(venue, error)
                except SourceError as error:
                    universe.pending_venues.add(venue)
                    universe.venue_errors[venue] = str(error)
                except SettingsError as error:
                    universe.pending_venues.discard(venue)
                    universe.venue_errors[venue] = str(error)
                    _log.error("symbols of a venue are not followed", venue=venue, why=str(error))

    async def _retract_removed_series(self) -> None:
        """Tell readers which series are followed no more, once it cannot be undone."""
        names = {one.name for one in self._universe.series}
        # What a venue should have said that is lost, or does not answer yet, is not known.
        former = await self._state.followed_series()
        away = self._universe.dropped_venues.keys() | self._universe.pending_venues
        names |= {name for name in former if Series.parse(name).venue in away}
        if gone := sorted(former - names):
            await self._retract(gone)
        await self._state.set_followed(names)

    async def _prune(self) -> None:
        while True:
            await asyncio.sleep(_PRUNE_SECONDS)
            kept = self._wall.now() - _OUTCOME_RETENTION_MS
            await self._state.prune(_RETAINED_LOOKBACKS * self.settings.lookback, kept)


async def _wait_all(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Return once all are done, however."""
    await asyncio.wait(tasks)
