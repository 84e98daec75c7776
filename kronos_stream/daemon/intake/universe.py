"""What is followed: the watchlist's symbols, and those that its patterns stand for today."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence

import structlog

from kronos_stream.daemon.config.settings import SettingsError
from kronos_stream.interfaces.source import (
    LoginRefused,
    RankingSource,
    Source,
    SourceError,
    VenueRefused,
)
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series
from kronos_stream.market.watchlist import WatchlistEntry

_log = structlog.get_logger()

RETRY_SECONDS = 5.0
_START_TIMEOUT_SECONDS = 30.0


class Universe:
    """A daemon's series, its venues, and which of these are lost."""

    def __init__(
        self,
        watchlist: Sequence[WatchlistEntry],
        series: Collection[Series],
        sources: Mapping[str, Source],
        clock: Clock,
        *,
        retry_login: bool = True,
    ) -> None:
        """series: what is followed beside the watchlist.

        patient: whether a venue is asked again that refuses our login at the start.
        """
        self.watchlist = watchlist
        self.series = frozenset(series)
        self.dropped_venues: dict[str, str] = {}
        """Venues that will not serve us, and why."""
        self.venue_errors: dict[str, str] = {}
        """Venues that do not answer yet, and why."""
        self.pending_venues: set[str] = set()
        """Venues that did not answer at the start: nothing of them is followed so far."""
        self._sources, self._clock, self._retry_login = sources, clock, retry_login

    async def resolve_initial(self, previous: Collection[Series]) -> None:
        """Find out what to follow at the start; returns once the venues have answered.

        One that refuses us is lost. One that does not answer is waited for no longer than others
        can be expected to wait for it; it is :attr:`absent` then. Where none answers, there is
        nothing to begin with: then the first one that does is waited for, however long it takes.
        held: what was followed before. Raises SettingsError for what no venue has, VenueRefused
        where every venue is lost, LoginRefused where that is not to be tried again.
        """
        asked = {
            asyncio.ensure_future(self._resolve_with_retry(venue, previous)): venue
            for venue in self._sources
        }
        try:
            done, waiting = await asyncio.wait(
                asked, timeout=_START_TIMEOUT_SECONDS, return_when=asyncio.FIRST_EXCEPTION
            )
            if not done:
                done, waiting = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        if problems := [line for task in done for line in task.result()]:
            raise SettingsError(problems)
        self.pending_venues = {asked[task] for task in waiting}
        if self.pending_venues:
            _log.error(
                "begins without venues that do not answer", venues=sorted(self.pending_venues)
            )

    async def resolve_pending(self, venue: str) -> frozenset[Series]:
        """What is to be followed now that an absent venue may answer.

        Raises SettingsError for what it cannot answer, SourceError where it is still away.
        """
        entries = [entry for entry in self.watchlist if entry.venue == venue]
        return self.series | await resolve(entries, self._sources, ())

    async def check(self) -> None:
        """As :meth:`settle`, but ask once. Raises SourceError, too."""
        lines = [line for venue in self._sources for line in await self._resolve_venue(venue, ())]
        if lines:
            raise SettingsError(lines)

    async def resolve_watchlist(self, watchlist: Sequence[WatchlistEntry]) -> frozenset[Series]:
        """What ``watchlist`` stands for now; what is followed of lost venues stays.

        Raises SettingsError for what no venue can answer, SourceError where one does not.
        """
        away = self.dropped_venues.keys() | self.pending_venues
        entries = [entry for entry in watchlist if entry.venue not in away]
        stays = {one for one in self.series if one.venue in self.dropped_venues}
        return await resolve(entries, self._sources, self.series) | stays

    async def validate_change(self, wanted: Collection[Series]) -> None:
        """Raises SettingsError where of ``wanted`` something new is nowhere to be had."""
        strange = sorted({one.venue for one in wanted} - self._sources.keys())
        lines = [f"{venue}: not among the venues at the start; restart" for venue in strange]
        if not lines:
            new = frozenset(wanted) - self.series
            lines = [
                line for venue in self._sources for line in await self._unsupported(venue, new)
            ]
        if lines:
            raise SettingsError(lines)

    def venue_problem(self, venue: str) -> str:
        """Why nothing comes of a venue, if it is known."""
        return self.dropped_venues.get(venue) or self.venue_errors.get(venue, "")

    def update_sources(self) -> None:
        """Tell the venues what is followed."""
        for venue, source in self._sources.items():
            source.subscribe([one for one in self.series if one.venue == venue])

    def drop_venue(self, venue: str, error: VenueRefused) -> None:
        """Go on without a venue that will not serve us; raise where it was the last."""
        self.dropped_venues[venue] = str(error)
        _log.error("venue refused us; its series stop here", venue=venue, why=str(error))
        if len(self.dropped_venues) == len(self._sources):
            raise error

    async def _resolve_with_retry(self, venue: str, previous: Collection[Series]) -> list[str]:
        """As :meth:`_settle`, for as long as it takes."""
        while True:
            try:
                lines = await self._resolve_venue(venue, previous)
            except VenueRefused as error:
                self.drop_venue(venue, error)
                lines = []
            except SourceError as error:
                if isinstance(error, LoginRefused) and not self._retry_login:
                    raise
                if self.venue_errors.get(venue) != str(error):
                    _log.warning("venue does not answer yet", venue=venue, why=str(error))
                self.venue_errors[venue] = str(error)
                await self._clock.sleep(max(RETRY_SECONDS, error.retry_after))
                continue
            self.venue_errors.pop(venue, None)
            return lines

    async def _resolve_venue(self, venue: str, previous: Collection[Series]) -> list[str]:
        """Follow what of the watchlist is the venue's; a line for each series it does not have."""
        entries = [entry for entry in self.watchlist if entry.venue == venue]
        chosen = await resolve(entries, self._sources, previous)
        lines = await self._unsupported(venue, self.series | chosen)
        self.series |= chosen
        return lines

    async def _unsupported(self, venue: str, series: Collection[Series]) -> list[str]:
        asked = [one for one in series if one.venue == venue]
        if not asked:
            return []
        found = await self._sources[venue].unsupported(asked)
        return [f"{one}: {why}" for one, why in sorted(found.items())]


async def resolve(
    entries: Sequence[WatchlistEntry], sources: Mapping[str, Source], previous: Collection[Series]
) -> frozenset[Series]:
    """The series of ``entries``.

    held: what was followed before; of a pattern's, those that are not far down stay.
    Raises SettingsError for what no venue can answer, SourceError where one does not.
    """
    chosen: set[Series] = set()
    problems: list[str] = []
    for entry in entries:
        source = sources.get(entry.venue)
        if source is None:
            problems.append(f"{entry.venue}: not among the venues at the start; restart")
        elif not entry.is_pattern:
            chosen.update(entry.series())
        elif not isinstance(source, RankingSource):
            problems.append(f"{entry}: {entry.venue} cannot say what is traded most; name symbols")
        else:
            named = {other.symbol for other in entries if other.venue == entry.venue}
            known = {one.symbol for one in previous if one.venue == entry.venue} - named
            symbols = entry.select(await source.ranked(entry.symbol), known)
            if not symbols:
                problems.append(f"{entry}: nothing that trades there is called so")
            chosen.update(entry.series(symbols))
    if problems:
        raise SettingsError(problems)
    return frozenset(chosen)
