"""SIGHUP: the set of series changes whole, one change after the other, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kronos_stream.daemon.config.settings import HttpSettings, Settings, SettingsError
from kronos_stream.daemon.roles.standalone import StandaloneRole
from kronos_stream.daemon.storage.state import State, StateError
from kronos_stream.market.clock import ManualClock
from kronos_stream.market.series import Series

FIRST, SECOND, THIRD = (Series.parse(f"venue:{name}/USDT:1m") for name in "ABC")


class _FakeVenue:
    """A source that is never run, and the desk that follows it."""

    def __init__(self) -> None:
        self.pointed: list[frozenset[Series]] = []
        self.followed: list[frozenset[Series]] = []
        self.under_way = 0

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:  # noqa: ARG002
        await asyncio.sleep(0)
        return {}

    async def ranked(self, pattern: str) -> Sequence[str]:  # noqa: ARG002
        await asyncio.sleep(0.05)
        return ["C/USDT"]

    def subscribe(self, series: Collection[Series]) -> None:
        self.pointed.append(frozenset(series))


class _FakePipeline:
    def __init__(self, venue: _FakeVenue) -> None:
        self._venue = venue

    async def follow(self, series: Collection[Series]) -> None:
        self._venue.under_way += 1
        assert self._venue.under_way == 1
        await asyncio.sleep(0)
        self._venue.followed.append(frozenset(series))
        self._venue.under_way -= 1


class _FakePublisher:
    """What readers are told, in order; the first time, it fails."""

    def __init__(self) -> None:
        self.tried = 0
        self.removed: list[list[str]] = []

    async def retract(self, series: Sequence[str]) -> None:
        self.tried += 1
        if self.tried == 1:
            raise StateError("the disk is full")
        self.removed.append(list(series))


@pytest.fixture
def venue() -> _FakeVenue:
    return _FakeVenue()


@pytest.fixture
async def daemon(venue: _FakeVenue, tmp_path: Path) -> AsyncIterator[StandaloneRole]:
    settings = Settings(
        model="nano",
        state_file=tmp_path / "state.sqlite",
        http=HttpSettings(port=0),
        symbols_file=tmp_path / "symbols",
    )
    source: Any = venue
    daemon = StandaloneRole(
        settings, {"venue": source}, [], clock=ManualClock(0), random=Random(0), series=[FIRST]
    )
    desk: Any = _FakePipeline(venue)
    daemon._pipeline = desk
    daemon._state = await State.open(tmp_path / "state.sqlite")
    press: Any = _FakePublisher()
    press.tried = 1
    daemon._publisher = press
    yield daemon
    await daemon._state.close()


async def test_a_venue_that_was_not_there_at_the_start_changes_nothing(
    daemon: StandaloneRole, venue: _FakeVenue
) -> None:
    daemon.ready.set()
    with pytest.raises(SettingsError, match="other: not among the venues at the start; restart"):
        await daemon.follow([SECOND, Series.parse("other:A/USDT:1m")])
    assert venue.followed == venue.pointed == []


async def test_changes_wait_for_the_start_and_for_each_other(
    daemon: StandaloneRole, venue: _FakeVenue
) -> None:
    changes = [asyncio.create_task(daemon.follow(some)) for some in ([SECOND], [THIRD], [FIRST])]
    await asyncio.sleep(0.01)
    assert venue.followed == []
    daemon.ready.set()
    await asyncio.gather(*changes)
    assert venue.followed == venue.pointed == [{SECOND}, {THIRD}, {FIRST}]


async def test_readers_are_told_once_what_is_gone(daemon: StandaloneRole) -> None:
    press: Any = daemon._publisher
    daemon.ready.set()
    await daemon.follow([FIRST, SECOND, THIRD])
    assert press.gone == []
    await daemon.follow([SECOND])
    await daemon.follow([SECOND])
    assert press.gone == [[FIRST.name, THIRD.name]]
    await daemon.follow([FIRST])
    assert press.gone[1:] == [[SECOND.name]]


async def test_what_could_not_be_told_is_told_later(daemon: StandaloneRole) -> None:
    press: Any = daemon._publisher
    daemon.ready.set()
    await daemon.follow([FIRST, SECOND])
    press.tried = 0
    with pytest.raises(StateError):
        await daemon.follow([SECOND])
    await daemon.follow([SECOND])
    assert press.gone == [[FIRST.name]]


async def test_of_two_readings_of_the_file_the_last_counts(
    daemon: StandaloneRole, venue: _FakeVenue, tmp_path: Path
) -> None:
    """The first has to ask what its pattern stands for, and must not come last for that."""
    daemon.ready.set()
    (tmp_path / "symbols").write_text("venue:*/USDT?top=1 1m", "utf-8")
    slow = asyncio.create_task(daemon.reload())
    await asyncio.sleep(0.01)
    (tmp_path / "symbols").write_text("venue:B/USDT 1m", "utf-8")
    await daemon.reload()
    await slow
    assert venue.followed == [{THIRD}, {SECOND}]


async def test_a_file_that_is_refused_is_forgotten(
    daemon: StandaloneRole, venue: _FakeVenue, tmp_path: Path
) -> None:
    """Also when the patterns' symbols are looked up anew, a day later."""
    daemon.ready.set()
    (tmp_path / "symbols").write_text("venue:*/USDT?top=1 1m", "utf-8")
    await daemon.reload()
    kept = daemon._universe.watchlist
    (tmp_path / "symbols").write_text("venue:*/USDT?top=1 1m\nother:A/USDT 1m", "utf-8")
    with pytest.raises(SettingsError, match="other: not among the venues at the start"):
        await daemon.reload()
    assert daemon._universe.watchlist == kept
    assert venue.followed == [{THIRD}]
