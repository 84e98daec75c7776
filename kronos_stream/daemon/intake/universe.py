"""Followed series: the symbols of the watchlist, and those its patterns currently match."""

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
    """Followed series of a daemon, and which of its venues are unavailable."""

    def __init__(
        self,
        watchlist: Sequence[WatchlistEntry],
        series: Collection[Series],
        sources: Mapping[str, Source],
        clock: Clock,
        *,
        retry_login: bool = True,
    ) -> None:
        """series: followed in addition to the watchlist.

        retry_login: try again where a venue refuses the login at the start.
        """
        self.watchlist = watchlist
        self.series = frozenset(series)
        self.dropped_venues: dict[str, str] = {}
        """Venues that refuse to serve this address → error."""
        self.venue_errors: dict[str, str] = {}
        """Venues that do not answer yet → error."""
        self.pending_venues: set[str] = set()
        """Venues that did not answer at the start; none of their series are followed yet."""
        self._sources, self._clock, self._retry_login = sources, clock, retry_login

    async def resolve_initial(self, previous: Collection[Series]) -> None:
        """Find out which series to follow at the start.

        Venues that refuse are dropped. Venues that do not answer in time are put into
        :attr:`pending_venues`; if none answers, wait for the first one without a time limit.
        previous: series followed by the last run. Raises SettingsError for series that no venue
        has, VenueRefused if all venues refuse, LoginRefused if logins are not retried.
        """
        attempts = {
            asyncio.ensure_future(self._resolve_with_retry(venue, previous)): venue
            for venue in self._sources
        }
        try:
            done, waiting = await asyncio.wait(
                attempts, timeout=_START_TIMEOUT_SECONDS, return_when=asyncio.FIRST_EXCEPTION
            )
            if not done:
                done, waiting = await asyncio.wait(attempts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in attempts:
                task.cancel()
            await asyncio.gather(*attempts, return_exceptions=True)
        if problems := [problem for task in done for problem in task.result()]:
            raise SettingsError(problems)
        self.pending_venues = {attempts[task] for task in waiting}
        if self.pending_venues:
            _log.error(
                "starting without venues that do not answer", venues=sorted(self.pending_venues)
            )

    async def resolve_pending(self, venue: str) -> frozenset[Series]:
        """Return the followed series with those of a pending venue.

        Raises SettingsError for entries it cannot resolve, SourceError if it does not answer.
        """
        entries = [entry for entry in self.watchlist if entry.venue == venue]
        return self.series | await resolve(entries, self._sources, ())

    async def resolve_watchlist(self, watchlist: Sequence[WatchlistEntry]) -> frozenset[Series]:
        """Return the series of ``watchlist``; followed series of dropped venues are kept.

        Raises SettingsError for entries no venue can resolve, SourceError if one does not answer.
        """
        unavailable = self.dropped_venues.keys() | self.pending_venues
        entries = [entry for entry in watchlist if entry.venue not in unavailable]
        kept = {one for one in self.series if one.venue in self.dropped_venues}
        return await resolve(entries, self._sources, self.series) | kept

    async def validate_change(self, wanted: Collection[Series]) -> None:
        """Raises SettingsError if a venue does not have one of the new series."""
        new = frozenset(wanted) - self.series
        problems = [one for venue in self._sources for one in await self._unsupported(venue, new)]
        if problems:
            raise SettingsError(problems)

    def venue_problem(self, venue: str) -> str:
        """Known reason why a venue delivers nothing; empty if there is none."""
        return self.dropped_venues.get(venue) or self.venue_errors.get(venue, "")

    def update_sources(self) -> None:
        """Subscribe each source to its followed series."""
        for venue, source in self._sources.items():
            source.subscribe([one for one in self.series if one.venue == venue])

    def drop_venue(self, venue: str, error: VenueRefused) -> None:
        """Continue without a venue that refuses this address; raise ``error`` if none is left."""
        self.dropped_venues[venue] = str(error)
        _log.error("venue refused this address; its series stop", venue=venue, why=str(error))
        if len(self.dropped_venues) == len(self._sources):
            raise error

    async def _resolve_with_retry(self, venue: str, previous: Collection[Series]) -> list[str]:
        """Call :meth:`_resolve_venue` until the venue answers."""
        while True:
            try:
                problems = await self._resolve_venue(venue, previous)
            except VenueRefused as error:
                self.drop_venue(venue, error)
                problems = []
            except SourceError as error:
                if isinstance(error, LoginRefused) and not self._retry_login:
                    raise
                if self.venue_errors.get(venue) != str(error):
                    _log.warning("venue does not answer yet", venue=venue, why=str(error))
                self.venue_errors[venue] = str(error)
                await self._clock.sleep(max(RETRY_SECONDS, error.retry_after))
                continue
            self.venue_errors.pop(venue, None)
            return problems

    async def _resolve_venue(self, venue: str, previous: Collection[Series]) -> list[str]:
        """Follow the watchlist entries of a venue; return a problem per series it does not have."""
        entries = [entry for entry in self.watchlist if entry.venue == venue]
        chosen = await resolve(entries, self._sources, previous)
        problems = await self._unsupported(venue, self.series | chosen)
        self.series |= chosen
        return problems

    async def _unsupported(self, venue: str, series: Collection[Series]) -> list[str]:
        own = [one for one in series if one.venue == venue]
        if not own:
            return []
        found = await self._sources[venue].unsupported(own)
        return [f"{one}: {why}" for one, why in sorted(found.items())]


async def resolve(
    entries: Sequence[WatchlistEntry], sources: Mapping[str, Source], previous: Collection[Series]
) -> frozenset[Series]:
    """Series of watchlist entries.

    previous: series followed so far; a ranked pattern keeps those slightly below its limit.
    Raises SettingsError for entries no venue can resolve, SourceError if one does not answer.
    """
    chosen: set[Series] = set()
    problems: list[str] = []
    for entry in entries:
        source = sources.get(entry.venue)
        if source is None:
            problems.append(f"{entry.venue}: not configured at the start; restart to add it")
        elif not entry.is_pattern:
            chosen.update(entry.series())
        elif not isinstance(source, RankingSource):
            problems.append(f"{entry}: {entry.venue} cannot rank symbols; name them")
        else:
            named = {other.symbol for other in entries if other.venue == entry.venue}
            known = {one.symbol for one in previous if one.venue == entry.venue} - named
            symbols = entry.select(await source.ranked(entry.symbol), known)
            if not symbols:
                problems.append(f"{entry}: no traded symbol matches")
            chosen.update(entry.series(symbols))
    if problems:
        raise SettingsError(problems)
    return frozenset(chosen)
