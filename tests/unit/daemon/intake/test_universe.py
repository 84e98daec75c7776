"""Initial resolution of the followed series, with venues that do not answer or refuse."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import Any

import pytest

from kronos_stream.daemon.config.settings import SettingsError
from kronos_stream.daemon.intake import universe
from kronos_stream.interfaces.source import LoginRefused, SourceError, VenueRefused
from kronos_stream.market.clock import SystemClock
from kronos_stream.market.series import Series
from kronos_stream.market.watchlist import WatchlistEntry

HERE, THERE = Series.parse("here:A/B:5m"), Series.parse("there:A/B:5m")


class _FakeVenue:
    """Source that answers, refuses, or does not answer."""

    def __init__(
        self,
        *,
        reachable: bool,
        refuses: bool = False,
        lists_symbols: bool = True,
        accepts_login: bool = True,
    ) -> None:
        self.reachable, self.refuses = reachable, refuses
        self.lists_symbols, self.accepts_login = lists_symbols, accepts_login

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:
        if self.refuses:
            raise VenueRefused("HTTP 451")
        if not self.accepts_login:
            raise LoginRefused("wrong password", 0.01)
        if not self.reachable:
            raise SourceError("no route to it", 0.01)
        return {} if self.lists_symbols else dict.fromkeys(series, "not listed")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(universe, "_START_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(universe, "RETRY_SECONDS", 0.01)


def _universe(*, retry_login: bool = True, **venues: _FakeVenue) -> universe.Universe:
    entries = [
        WatchlistEntry.parse(f"{venue}:A/B")._replace(timeframes=(HERE.timeframe,))
        for venue in venues
    ]
    sources: Any = venues
    return universe.Universe(entries, (), sources, SystemClock(), retry_login=retry_login)


async def test_unreachable_venue_is_pending_and_does_not_delay_others() -> None:
    found = _universe(here=_FakeVenue(reachable=True), there=_FakeVenue(reachable=False))
    await found.resolve_initial(())
    assert found.series == {HERE}
    assert found.pending_venues == {"there"}
    assert found.venue_problem("there") == "no route to it"
    assert found.venue_problem("here") == ""


async def test_first_venue_to_answer_is_awaited_if_none_does() -> None:
    here, there = _FakeVenue(reachable=False), _FakeVenue(reachable=False)
    found = _universe(here=here, there=there)
    resolving = asyncio.create_task(found.resolve_initial(()))
    await asyncio.sleep(0.3)
    assert not resolving.done()
    assert found.venue_problem("here") == "no route to it"
    here.reachable = True
    await resolving
    assert found.series == {HERE}
    assert found.pending_venues == {"there"}


async def test_refusal_drops_the_venue_and_of_the_last_one_is_an_error() -> None:
    found = _universe(
        here=_FakeVenue(reachable=True), there=_FakeVenue(reachable=True, refuses=True)
    )
    await found.resolve_initial(())
    assert found.dropped_venues == {"there": "HTTP 451"}
    with pytest.raises(VenueRefused):
        await _universe(there=_FakeVenue(reachable=True, refuses=True)).resolve_initial(())


async def test_refused_login_is_an_error_at_once_or_retried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(universe, "_START_TIMEOUT_SECONDS", 3_600)
    here, there = _FakeVenue(reachable=False), _FakeVenue(reachable=True, accepts_login=False)
    with pytest.raises(LoginRefused):  # without waiting for the unreachable venue
        async with asyncio.timeout(300):
            await _universe(here=here, there=there, retry_login=False).resolve_initial(())
    found = _universe(there=there)
    resolving = asyncio.create_task(found.resolve_initial(()))
    await asyncio.sleep(0.1)
    assert found.venue_problem("there") == "wrong password"
    there.accepts_login = True
    await resolving
    assert found.series == {THERE}


async def test_missing_symbol_is_an_error_although_another_venue_is_unreachable() -> None:
    found = _universe(
        here=_FakeVenue(reachable=True, lists_symbols=False), there=_FakeVenue(reachable=False)
    )
    with pytest.raises(SettingsError, match="here:A/B:5m: not listed"):
        await found.resolve_initial(())
