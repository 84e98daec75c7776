"""SIGHUP: the set of series changes whole, one change after the other, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kronos_stream.daemon.app import Daemon
from kronos_stream.daemon.settings import Http, Settings, SettingsError
from kronos_stream.market.clock import DrivenClock
from kronos_stream.market.series import Series

FIRST, SECOND, THIRD = (Series.parse(f"venue:{name}/USDT:1m") for name in "ABC")


class _Venue:
    """A source that is never run, and the desk that follows it."""

    def __init__(self) -> None:
        self.pointed: list[frozenset[Series]] = []
        self.followed: list[frozenset[Series]] = []
        self.under_way = 0

    async def unknown(self, series: Collection[Series]) -> Mapping[Series, str]:  # noqa: ARG002
        await asyncio.sleep(0)
        return {}

    def follow(self, series: Collection[Series]) -> None:
        self.pointed.append(frozenset(series))


class _Desk:
    def __init__(self, venue: _Venue) -> None:
        self._venue = venue

    async def follow(self, series: Collection[Series]) -> None:
        self._venue.under_way += 1
        assert self._venue.under_way == 1
        await asyncio.sleep(0)
        self._venue.followed.append(frozenset(series))
        self._venue.under_way -= 1


@pytest.fixture
def venue() -> _Venue:
    return _Venue()


@pytest.fixture
def daemon(venue: _Venue, tmp_path: Path) -> Daemon:
    settings = Settings(model="nano", state_file=tmp_path / "state.sqlite", http=Http(port=0))
    source: Any = venue
    daemon = Daemon(
        settings, {"venue": source}, [], clock=DrivenClock(0), random=Random(0), series=[FIRST]
    )
    desk: Any = _Desk(venue)
    daemon._desk = desk
    return daemon


async def test_a_venue_that_was_not_there_at_the_start_changes_nothing(
    daemon: Daemon, venue: _Venue
) -> None:
    daemon.ready.set()
    with pytest.raises(SettingsError, match="other: not among the venues at the start; restart"):
        await daemon.follow([SECOND, Series.parse("other:A/USDT:1m")])
    assert venue.followed == venue.pointed == []


async def test_changes_wait_for_the_start_and_for_each_other(daemon: Daemon, venue: _Venue) -> None:
    changes = [asyncio.create_task(daemon.follow(some)) for some in ([SECOND], [THIRD], [FIRST])]
    await asyncio.sleep(0.01)
    assert venue.followed == []
    daemon.ready.set()
    await asyncio.gather(*changes)
    assert venue.followed == venue.pointed == [{SECOND}, {THIRD}, {FIRST}]
