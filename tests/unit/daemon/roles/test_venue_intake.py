"""Changes of the followed series: reloads, and venues that answer only after the start."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kronos_stream.daemon.config.settings import HttpSettings, Settings, SettingsError
from kronos_stream.daemon.intake import universe
from kronos_stream.daemon.roles import venue_intake
from kronos_stream.daemon.roles.venue_intake import VenueIntake
from kronos_stream.daemon.status.series import SeriesStatusRegistry
from kronos_stream.daemon.storage.database import StateError
from kronos_stream.daemon.storage.state import State
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.source import SourceCallbacks, SourceError, Traits
from kronos_stream.market.candle import Candle
from kronos_stream.market.clock import SystemClock
from kronos_stream.market.series import Series
from kronos_stream.market.watchlist import WatchlistEntry

FIRST, SECOND, THIRD = (Series.parse(f"venue:{name}/USDT:1m") for name in "ABC")
OTHER = Series.parse("other:A/USDT:1m")


class FakeVenue:
    """Source without candles that records subscriptions."""

    traits = Traits()

    def __init__(self, *, reachable: bool = True) -> None:
        self.reachable, self.lists_symbols = reachable, True
        self.subscribed: list[frozenset[Series]] = []

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:
        await asyncio.sleep(0)
        if not self.reachable:
            raise SourceError("no route to it", 0.01)
        return {} if self.lists_symbols else dict.fromkeys(series, "not listed")

    async def ranked(self, pattern: str) -> Sequence[str]:  # noqa: ARG002
        await asyncio.sleep(0.05)
        return ["C/USDT"]

    def subscribe(self, series: Collection[Series]) -> None:
        self.subscribed.append(frozenset(series))

    async def run(self, callbacks: SourceCallbacks) -> None:  # noqa: ARG002
        await asyncio.Event().wait()

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:  # noqa: ARG002
        return []

    async def close(self) -> None:
        await asyncio.sleep(0)


class IntakeHarness:
    """A venue intake with its state file, and the series that it retracted."""

    def __init__(self, settings: Settings, venues: Mapping[str, FakeVenue], **options: Any) -> None:
        clock, sources = SystemClock(), dict[str, Any](venues)
        self.symbols_file = settings.symbols_file
        self.state_file = settings.state_file
        self.intake = VenueIntake(
            settings,
            sources,
            SeriesStatusRegistry(clock),
            Metrics(),
            clock=clock,
            wall=clock,
            random=Random(0),
            **options,
        )
        self.retracted: list[list[str]] = []
        self.failing_retractions = 0
        self._changing = False

    @asynccontextmanager
    async def started(self, previous: Collection[Series] = ()) -> AsyncIterator[State]:
        """Started, but not running. previous: series followed by the last run."""
        state = await State.open(self.state_file)
        try:
            await state.set_followed([one.name for one in previous])
            await self.intake.resolve(state)
            await self.intake.start(lambda _: None, lambda *_: None, self._retract)
            self._assert_changes_are_sequential()
            yield state
        finally:
            await state.close()

    def write_symbols(self, *lines: str) -> None:
        assert self.symbols_file is not None
        self.symbols_file.write_text("\n".join(lines), "utf-8")

    async def reload(self, *lines: str) -> None:
        self.write_symbols(*lines)
        await self.intake.reload()

    async def _retract(self, series: Sequence[str]) -> None:
        if self.failing_retractions:
            self.failing_retractions -= 1
            raise StateError("the disk is full")
        self.retracted.append(list(series))

    def _assert_changes_are_sequential(self) -> None:
        pipeline: Any = self.intake.pipeline
        follow = pipeline.follow

        async def checked_follow(series: Collection[Series]) -> None:
            assert not self._changing
            self._changing = True
            await asyncio.sleep(0)
            await follow(series)
            self._changing = False

        pipeline.follow = checked_follow


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(300):
        while not condition():  # noqa: ASYNC110 - the condition has no event
            await asyncio.sleep(0.01)


# -- reloads of the symbols file -----------------------------------------------------------


@pytest.fixture
def venue() -> FakeVenue:
    return FakeVenue()


@pytest.fixture
async def harness(venue: FakeVenue, tmp_path: Path) -> IntakeHarness:
    settings = Settings(
        model="nano",
        state_file=tmp_path / "state.sqlite",
        http=HttpSettings(port=0),
        symbols_file=tmp_path / "symbols",
    )
    return IntakeHarness(settings, {"venue": venue}, series=[FIRST])


async def test_reload_with_unknown_venue_changes_nothing(
    harness: IntakeHarness, venue: FakeVenue
) -> None:
    async with harness.started(), harness.intake.running():
        with pytest.raises(
            SettingsError, match="other: not configured at the start; restart to add it"
        ):
            await harness.reload("venue:B/USDT 1m", "other:A/USDT 1m")
        assert venue.subscribed == [{FIRST}]
        assert harness.intake.universe.series == {FIRST}


async def test_reloads_wait_for_the_start_and_for_each_other(
    harness: IntakeHarness, venue: FakeVenue
) -> None:
    async with harness.started():
        harness.write_symbols("venue:B/USDT 1m")
        reloads = [asyncio.create_task(harness.intake.reload()) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert venue.subscribed == []
        async with harness.intake.running():
            await asyncio.gather(*reloads)
            assert venue.subscribed == [{FIRST}, {SECOND}, {SECOND}, {SECOND}]


async def test_removed_series_are_retracted_once(harness: IntakeHarness) -> None:
    first, second, third = (f"venue:{name}/USDT 1m" for name in "ABC")
    async with harness.started(), harness.intake.running():
        await harness.reload(first, second, third)
        assert harness.retracted == []
        await harness.reload(second)
        await harness.reload(second)
        assert harness.retracted == [[FIRST.name, THIRD.name]]
        await harness.reload(first)
        assert harness.retracted[1:] == [[SECOND.name]]


async def test_failed_retraction_is_repeated(harness: IntakeHarness) -> None:
    async with harness.started(), harness.intake.running():
        await harness.reload("venue:A/USDT 1m", "venue:B/USDT 1m")
        harness.failing_retractions = 1
        with pytest.raises(StateError):
            await harness.reload("venue:B/USDT 1m")
        await harness.reload("venue:B/USDT 1m")
        assert harness.retracted == [[FIRST.name]]


async def test_later_of_two_reloads_counts(harness: IntakeHarness, venue: FakeVenue) -> None:
    """The first one is still looking up its pattern when the second one begins."""
    async with harness.started(), harness.intake.running():
        slow = asyncio.create_task(harness.reload("venue:*/USDT?top=1 1m"))
        await asyncio.sleep(0.01)
        await harness.reload("venue:B/USDT 1m")
        await slow
        assert venue.subscribed == [{FIRST}, {THIRD}, {SECOND}]


async def test_rejected_symbols_file_is_discarded(harness: IntakeHarness, venue: FakeVenue) -> None:
    """The daily refresh of patterns still uses the last valid one."""
    async with harness.started(), harness.intake.running():
        await harness.reload("venue:*/USDT?top=1 1m")
        valid = harness.intake.universe.watchlist
        with pytest.raises(SettingsError, match="other: not configured at the start"):
            await harness.reload("venue:*/USDT?top=1 1m", "other:A/USDT 1m")
        assert harness.intake.universe.watchlist == valid
        assert venue.subscribed == [{FIRST}, {THIRD}]


# -- venues that do not answer at the start ------------------------------------------------


@pytest.fixture
def unreachable() -> FakeVenue:
    return FakeVenue(reachable=False)


@pytest.fixture
async def half_reachable(
    unreachable: FakeVenue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> IntakeHarness:
    """An intake of two venues, one of which does not answer."""
    monkeypatch.setattr(universe, "_START_TIMEOUT_SECONDS", 0.1)
    for module in (universe, venue_intake):
        monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    settings = Settings(
        symbols=(WatchlistEntry("venue", "A/USDT"), WatchlistEntry("other", "A/USDT")),
        timeframes=(FIRST.timeframe,),
        model="nano",
        state_file=tmp_path / "state.sqlite",
        http=HttpSettings(port=0),
    )
    return IntakeHarness(settings, {"venue": FakeVenue(), "other": unreachable})


async def test_pending_venue_is_followed_once_it_answers(
    half_reachable: IntakeHarness, unreachable: FakeVenue
) -> None:
    intake = half_reachable.intake
    async with half_reachable.started([FIRST, OTHER]) as state, intake.running():
        await wait_until(lambda: intake.universe.venue_problem("other") == "no route to it")
        unreachable.reachable = True
        await wait_until(lambda: not intake.universe.venue_problem("other"))
        assert intake.universe.series == intake.pipeline.series_states.keys() == {FIRST, OTHER}
        assert unreachable.subscribed == [frozenset(), {OTHER}]
        assert half_reachable.retracted == []
        assert await state.followed_series() == {FIRST.name, OTHER.name}


async def test_reload_leaves_pending_venues_alone(half_reachable: IntakeHarness) -> None:
    intake = half_reachable.intake
    async with half_reachable.started([FIRST, OTHER]), intake.running():
        await intake.reload()
        assert intake.universe.series == {FIRST}
        assert intake.universe.pending_venues == {"other"}
        assert half_reachable.retracted == []


async def test_pending_venue_without_the_symbol_is_given_up(
    half_reachable: IntakeHarness, unreachable: FakeVenue
) -> None:
    intake = half_reachable.intake
    async with half_reachable.started([FIRST, OTHER]), intake.running():
        unreachable.reachable, unreachable.lists_symbols = True, False
        await wait_until(lambda: not intake.universe.pending_venues)
        assert intake.universe.venue_problem("other") == f"{OTHER}: not listed"
        assert intake.universe.series == {FIRST}
