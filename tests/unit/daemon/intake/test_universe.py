"""Venues that are away at the start: the others do not wait, and nothing of them is told gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kronos_stream.daemon.config.settings import HttpSettings, Settings, SettingsError
from kronos_stream.daemon.intake import universe
from kronos_stream.daemon.roles import venue as following
from kronos_stream.daemon.roles.standalone import StandaloneRole
from kronos_stream.daemon.storage.state import State
from kronos_stream.interfaces.source import LoginRefused, SourceError, VenueRefused
from kronos_stream.market.clock import SystemClock
from kronos_stream.market.series import Series
from kronos_stream.market.watchlist import WatchlistEntry

HERE, THERE = Series.parse("here:A/B:5m"), Series.parse("there:A/B:5m")


class _FakeVenue:
    """Answers once it is back."""

    def __init__(
        self, *, back: bool, refuses: bool = False, has: bool = True, login: bool = True
    ) -> None:
        self.back, self.refuses, self.has, self.login = back, refuses, has, login
        self.pointed: list[frozenset[Series]] = []

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:
        if self.refuses:
            raise VenueRefused("HTTP 451")
        if not self.login:
            raise LoginRefused("wrong password", 0.01)
        if not self.back:
            raise SourceError("no route to it", 0.01)
        return {} if self.has else dict.fromkeys(series, "not listed")

    def subscribe(self, series: Collection[Series]) -> None:
        self.pointed.append(frozenset(series))


class _FakePipeline:
    """The desk and the press, which are told of changes."""

    def __init__(self) -> None:
        self.followed: list[frozenset[Series]] = []
        self.removed: list[list[str]] = []

    async def follow(self, series: Collection[Series]) -> None:
        self.followed.append(frozenset(series))

    async def retract(self, series: Sequence[str]) -> None:
        self.removed.append(list(series))


@pytest.fixture(autouse=True)
def _short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(universe, "_START_TIMEOUT_SECONDS", 0.1)
    for module in (universe, following):
        monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)


def _universe(*, patient: bool = True, **venues: _FakeVenue) -> universe.Universe:
    entries = [
        WatchlistEntry.parse(f"{venue}:A/B")._replace(timeframes=(HERE.timeframe,))
        for venue in venues
    ]
    sources: Any = venues
    return universe.Universe(entries, (), sources, SystemClock(), retry_login=patient)


async def test_who_does_not_answer_holds_nobody_up_and_is_named() -> None:
    found = _universe(here=_FakeVenue(back=True), there=_FakeVenue(back=False))
    await found.resolve_initial(())
    assert found.series == {HERE}
    assert found.pending_venues == {"there"}
    assert found.venue_problem("there") == "no route to it"
    assert found.venue_problem("here") == ""


async def test_where_nobody_answers_the_first_that_does_is_waited_for() -> None:
    here, there = _FakeVenue(back=False), _FakeVenue(back=False)
    found = _universe(here=here, there=there)
    settling = asyncio.create_task(found.resolve_initial(()))
    await asyncio.sleep(0.3)
    assert not settling.done()
    assert found.venue_problem("here") == "no route to it"
    here.back = True
    await settling
    assert found.series == {HERE}
    assert found.pending_venues == {"there"}


async def test_a_refusal_is_final_and_of_the_last_venue_an_error() -> None:
    found = _universe(here=_FakeVenue(back=True), there=_FakeVenue(back=True, refuses=True))
    await found.resolve_initial(())
    assert found.dropped_venues == {"there": "HTTP 451"}
    with pytest.raises(VenueRefused):
        await _universe(there=_FakeVenue(back=True, refuses=True)).resolve_initial(())


async def test_a_refused_login_is_the_end_at_once_or_asked_again_as_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(universe, "_START_TIMEOUT_SECONDS", 3_600)
    here, there = _FakeVenue(back=False), _FakeVenue(back=True, login=False)
    with pytest.raises(LoginRefused):  # nor is the one waited for that does not answer
        async with asyncio.timeout(300):
            await _universe(here=here, there=there, patient=False).resolve_initial(())
    found = _universe(there=there)
    settling = asyncio.create_task(found.resolve_initial(()))
    await asyncio.sleep(0.1)
    assert found.venue_problem("there") == "wrong password"
    there.login = True
    await settling
    assert found.series == {THERE}


async def test_what_a_venue_lacks_is_an_error_whoever_is_away() -> None:
    found = _universe(here=_FakeVenue(back=True, has=False), there=_FakeVenue(back=False))
    with pytest.raises(SettingsError, match="here:A/B:5m: not listed"):
        await found.resolve_initial(())


@pytest.fixture
async def others() -> _FakePipeline:
    return _FakePipeline()


@pytest.fixture
async def daemon(others: _FakePipeline, tmp_path: Path) -> AsyncIterator[StandaloneRole]:
    """A daemon past its start, with one of two venues away that it used to follow."""
    settings = Settings(
        symbols=(WatchlistEntry("here", "A/B"), WatchlistEntry("there", "A/B")),
        model="nano",
        state_file=tmp_path / "state.sqlite",
        http=HttpSettings(port=0),
    )
    sources: Any = {"here": _FakeVenue(back=True), "there": _FakeVenue(back=False)}
    daemon = StandaloneRole(settings, sources, [], clock=SystemClock(), random=Random(0))
    daemon._state = await State.open(settings.state_file)
    await daemon._state.set_followed([HERE.name, THERE.name])
    both: Any = others
    daemon._pipeline = daemon._publisher = both
    await daemon._universe.resolve_initial((HERE, THERE))
    await daemon._retract_removed_series()
    daemon.ready.set()
    yield daemon
    await daemon._state.close()


async def test_once_it_answers_it_is_followed_and_was_never_gone(
    daemon: StandaloneRole, others: _FakePipeline
) -> None:
    there: Any = daemon._sources["there"]
    welcoming = asyncio.create_task(daemon._retry_pending_venues())
    await asyncio.sleep(0.1)
    assert daemon._universe.venue_problem("there") == "no route to it"
    there.back = True
    await asyncio.wait_for(welcoming, 300)
    assert others.followed == [{HERE, THERE}]
    assert there.pointed == [{THERE}]
    assert others.removed == []
    assert daemon._universe.venue_problem("there") == ""
    assert await daemon._state.followed_series() == {HERE.name, THERE.name}


async def test_a_reload_meanwhile_changes_the_others_alone(
    daemon: StandaloneRole, others: _FakePipeline
) -> None:
    await daemon.reload()
    assert others.followed == [{HERE}]
    assert others.removed == []


async def test_what_it_then_lacks_is_said_and_asked_for_no_more(
    daemon: StandaloneRole, others: _FakePipeline
) -> None:
    there: Any = daemon._sources["there"]
    there.back, there.has = True, False
    await asyncio.wait_for(daemon._retry_pending_venues(), 300)
    assert daemon._universe.venue_problem("there") == "there:A/B:5m: not listed"
    assert others.followed == []
