"""Intake from venues: their sources and the pipeline, and changes of the followed series."""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random

import structlog

from kronos_stream.daemon.config.settings import Settings, SettingsError
from kronos_stream.daemon.intake.pipeline import IntakePipeline
from kronos_stream.daemon.intake.save_queue import Relay
from kronos_stream.daemon.intake.saved_bars import SavedBars
from kronos_stream.daemon.intake.universe import RETRY_SECONDS, Universe
from kronos_stream.daemon.requests import ForecastRequest
from kronos_stream.daemon.roles import stall_checks
from kronos_stream.daemon.status.series import SeriesStatusRegistry
from kronos_stream.daemon.status.watchdog import StallCheck
from kronos_stream.daemon.storage.state import State
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.source import Source, SourceError, VenueRefused
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_log = structlog.get_logger()

_REFRESH_SECONDS = 86_400.0
"""Interval at which the symbols of patterns are looked up again."""
_REFRESH_RETRY_SECONDS = 600.0
_PRUNE_SECONDS = 600.0
_RETAINED_LOOKBACKS = 4
"""Bars kept per series, in lookbacks."""
_OUTCOME_RETENTION_MS = 3 * 86_400_000


class VenueIntake:
    """Sources of all venues, the pipeline they feed, and the set of followed series."""

    saved_bars: SavedBars
    pipeline: IntakePipeline

    def __init__(
        self,
        settings: Settings,
        sources: Mapping[str, Source],
        status: SeriesStatusRegistry,
        metrics: Metrics,
        *,
        clock: Clock,
        wall: Clock,
        random: Random,
        series: Collection[Series] | None = None,
    ) -> None:
        """series: followed in place of those of the settings."""
        metrics.initialise_labels(venues=sources)
        self._settings, self._sources = settings, dict(sources)
        self._status, self._metrics = status, metrics
        self._clock, self._wall, self._random = clock, wall, random
        watchlist = settings.watchlist() if series is None else ()
        retry_login = settings.login_refused == "retry"
        self.universe = Universe(
            watchlist, series or (), self._sources, clock, retry_login=retry_login
        )
        self._started = asyncio.Event()
        self._change_lock = asyncio.Lock()

    @property
    def series_count(self) -> int:
        return len(self.universe.series)

    def problems(self) -> Mapping[str, str]:
        silent = self._status.silent_venues(self._sources)
        return {
            f"source {venue}": self.universe.venue_problem(venue) or silent.get(venue, "")
            for venue in self._sources
        }

    def stall_checks(self) -> Iterable[StallCheck]:
        return stall_checks.intake(self.pipeline, self._clock)

    async def close(self) -> None:
        async with AsyncExitStack() as stack:
            for source in self._sources.values():
                stack.push_async_callback(source.close)

    async def resolve(self, state: State) -> None:
        """Find out which series to follow; those of the last run count where patterns rank."""
        self._state = state
        previous = map(Series.parse, await state.followed_series())
        await self.universe.resolve_initial(frozenset(previous))
        settings = self._settings
        self.saved_bars = SavedBars(
            state,
            self._clock,
            self._metrics,
            lookback=settings.lookback,
            degraded=settings.degraded,
        )

    async def start(
        self,
        submit: Callable[[ForecastRequest], None],
        dead_letter: Callable[[Series | None, str, bytes], None],
        retract: Callable[[Sequence[str]], Awaitable[None]],
        relay: Relay | None = None,
    ) -> None:
        """Load the series from the state file, after :meth:`resolve`.

        retract: publishes that series are not followed any more; durable on return. The rest is
        as for :class:`IntakePipeline`.
        """
        self._retract = retract
        pipeline = self.pipeline = IntakePipeline(
            self._sources,
            self.saved_bars,
            submit,
            self._clock,
            self._random,
            self._metrics,
            catch_up=self._settings.catch_up,
            dead_letter=dead_letter,
            relay=relay,
        )
        self._status.track(lambda: pipeline.series_states)
        await pipeline.follow(self.universe.series)
        await self._retract_removed_series()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Event]:
        """Follow the venues inside this context. The event is set when all their data ended."""
        self.universe.update_sources()
        ended = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            sources = [
                tasks.create_task(self._run_source(venue, source))
                for venue, source in self._sources.items()
                if venue not in self.universe.dropped_venues
            ]
            helpers = [
                tasks.create_task(work)
                for work in (
                    self.pipeline.run(),
                    self._refresh(),
                    self._retry_pending_venues(),
                    self._prune(),
                    _set_after(ended, sources),
                )
            ]
            self._started.set()
            _log.info("following", series=self.series_count, venues=sorted(self._sources))
            yield ended
            self._started.clear()
            for task in (*helpers, *sources):
                task.cancel()

    async def reload(self) -> None:
        """Follow the series of the present settings, once started.

        Raises SettingsError or SourceError where nothing was changed.
        """
        async with self._change_lock:
            await self._started.wait()
            # Read inside the lock: of two reloads, the later reading counts.
            watchlist = self._settings.watchlist()
            await self._change_series(await self.universe.resolve_watchlist(watchlist))
            self.universe.watchlist = watchlist

    async def _run_source(self, venue: str, source: Source) -> None:
        try:
            await source.run(self.pipeline.callbacks(venue))
        except VenueRefused as error:
            self.universe.drop_venue(venue, error)

    async def _change_series(self, wanted: frozenset[Series]) -> None:
        """Follow exactly these; call it inside the lock."""
        universe = self.universe
        await universe.validate_change(wanted)
        removed, added = universe.series - wanted, wanted - universe.series
        universe.series = wanted
        await self.pipeline.follow(wanted)
        universe.update_sources()
        await self._retract_removed_series()
        _log.info("series changed", added=len(added), removed=len(removed), series=len(wanted))

    async def _refresh(self) -> None:
        """Look up the symbols of patterns once a day."""
        pause = _REFRESH_SECONDS
        while True:
            await self._clock.sleep(pause)
            pause = _REFRESH_SECONDS
            if not any(entry.is_pattern for entry in self.universe.watchlist):
                continue
            try:
                async with self._change_lock:
                    await self._change_series(
                        await self.universe.resolve_watchlist(self.universe.watchlist)
                    )
            except (SettingsError, SourceError) as error:
                _log.warning("symbol lookup failed; symbols stay as they are", why=str(error))
                pause = _REFRESH_RETRY_SECONDS

    async def _retry_pending_venues(self) -> None:
        """Follow venues that did not answer at the start, once they do."""
        universe = self.universe
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
        """Publish which series are not followed any more."""
        names = {one.name for one in self.universe.series}
        # The series of dropped and pending venues may be followed again: they are not retracted.
        former = await self._state.followed_series()
        away = self.universe.dropped_venues.keys() | self.universe.pending_venues
        names |= {name for name in former if Series.parse(name).venue in away}
        if removed := sorted(former - names):
            await self._retract(removed)
        await self._state.set_followed(names)

    async def _prune(self) -> None:
        while True:
            await asyncio.sleep(_PRUNE_SECONDS)
            oldest_outcome = self._wall.now() - _OUTCOME_RETENTION_MS
            await self._state.prune(_RETAINED_LOOKBACKS * self._settings.lookback, oldest_outcome)


async def _set_after(ended: asyncio.Event, tasks: Collection[asyncio.Task[None]]) -> None:
    await asyncio.wait(tasks)
    ended.set()
