"""The desk: whatever a venue does, every closed bar is saved and due once, in order, not early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
import pytest

from kronos_stream.daemon.intake.pipeline import IntakePipeline
from kronos_stream.daemon.intake.saved_bars import SavedBars
from kronos_stream.daemon.requests import ForecastRequest, Outcome
from kronos_stream.daemon.storage.state import State, StateError
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.source import SourceCallbacks, SourceError, Traits
from kronos_stream.market.candle import Bar, Candle, Update
from kronos_stream.market.clock import Clock, LoopClock
from kronos_stream.market.series import Series
from kronos_stream.testing.virtual_time import run_virtual

START = 1_718_712_000_000
LOOKBACK = 40


@dataclass
class VenueFaults:
    """Shares of pushes, or of answers, that go wrong."""

    drop: float = 0
    drop_final: float = 0
    duplicate: float = 0
    late: float = 0
    revise: float = 0
    premature_close: float = 0
    invalid: float = 0
    reject_requests: float = 0
    lag_seconds: float = 0
    empty_bars: float = 0
    """Share of bars that the venue does not have."""
    push_outage: tuple[int, int] = (0, 0)
    """Bars from and before which nothing is pushed."""
    rest_outage: tuple[int, int] = (0, 0)
    """Bars from and before which REST is not there."""


@dataclass
class FakeVenue:
    """A venue of one process: a truth of bars, told with seeded faults."""

    series: Sequence[Series]
    clock: Clock
    random: Random
    faults: VenueFaults = field(default_factory=VenueFaults)
    traits: Traits = field(default_factory=lambda: Traits(fills_empty=True))
    venue: str = "binance"
    history_requests: list[tuple[Series, int, int]] = field(default_factory=list)
    true_bars: dict[Series, dict[int, Candle]] = field(default_factory=dict)
    changes: dict[tuple[Series, int], tuple[int, Candle]] = field(default_factory=dict)
    suspensions: dict[Series, tuple[int, int]] = field(default_factory=dict)
    """From when and before when a series has no bars at all."""
    first: int = 0
    """Open of the first bar that the venue has."""
    pushes: bool = True

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:  # noqa: ARG002
        return {}

    def subscribe(self, series: Collection[Series]) -> None:
        self.series = list(series)

    async def close(self) -> None:
        pass

    def bar(self, series: Series, time: int) -> Candle | None:
        """The venue's present word on a bar."""
        known = self.true_bars.setdefault(series, {})
        since, until = self.suspensions.get(series, (0, 0))
        if time < self.first or since <= time < until:
            return None
        moment, changed = self.changes.get((series, time), (0, None))
        if changed is not None and self.clock.now() >= moment:
            return changed
        if time not in known:
            dice = Random(f"{series} {time}")
            if dice.random() < self.faults.empty_bars:
                return None
            opened, close = (100 + dice.randrange(1000) / 100 for _ in range(2))
            high, low = max(opened, close) + 1, min(opened, close) - 1
            known[time] = Candle(time, opened, high, low, close, dice.randrange(1, 99), 5.0)
        return known[time]

    def revise(self, series: Series, time: int, moment: int) -> Candle:
        """Have a bar changed at that moment."""
        bar = self.bar(series, time)
        assert bar is not None
        changed = bar._replace(volume=bar.volume + 1000)
        self.changes[series, time] = moment, changed
        return changed

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        self.history_requests.append((series, start, end))
        await self.clock.sleep(0.05)
        now, step = self.clock.now(), series.timeframe.milliseconds or 0
        bar = (now - START) // step
        if self.faults.rest_outage[0] <= bar < self.faults.rest_outage[1]:
            raise SourceError("down")
        if self.random.random() < self.faults.reject_requests:
            raise SourceError("try again", retry_after=self.random.choice((0, 3)))
        end = min(end, now - round(1000 * self.faults.lag_seconds) - step + 1)
        bars = (self.bar(series, time) for time in range(start + -start % step, end, step))
        return [bar for bar in bars if bar is not None]

    async def run(self, callbacks: SourceCallbacks) -> None:
        async with asyncio.TaskGroup() as tasks:
            for one in self.series:
                tasks.create_task(self._push(callbacks, one))

    async def _push(self, intake: SourceCallbacks, one: Series) -> None:
        step = one.timeframe.milliseconds or 0
        time = self.clock.now() // step * step
        async with asyncio.TaskGroup() as tasks:

            async def tell(candle: Candle, moment: int, late: float, *, closed: bool) -> None:
                await self.clock.sleep_until(moment)
                await self.clock.sleep(late)
                intake.update(Update(one, candle, closed, self.clock.now()))

            while True:
                for moment, candle, closed in self._pushes_of(one, time):
                    late = self.random.uniform(0, 1.5) if self._chance(self.faults.late) else 0
                    for _ in range(2 if self._chance(self.faults.duplicate) else 1):
                        tasks.create_task(tell(candle, moment, late, closed=closed))
                        late += self.random.uniform(0, 3)
                time += step
                await self.clock.sleep_until(time)

    def _pushes_of(self, one: Series, time: int) -> Iterator[tuple[int, Candle, bool]]:
        """What is pushed of a bar, and when."""
        faults, step = self.faults, one.timeframe.milliseconds or 0
        final = self.bar(one, time)
        bar = (time - START) // step
        if final is None or not self.pushes or faults.push_outage[0] <= bar < faults.push_outage[1]:
            return
        for moment in (time + step // 4, time + step * 3 // 4):
            so_far = final._replace(close=final.open, volume=final.volume / 2)
            if not self._chance(faults.drop):
                yield moment, so_far, False
            if self._chance(faults.premature_close) and step // 4 > 2_000:
                yield moment, so_far, True
            if self._chance(faults.invalid):
                yield moment, final._replace(high=0.5), True
        end = time + step + 20
        if not self._chance(max(faults.drop, faults.drop_final)):
            yield end, final, True
        if self._chance(faults.revise) and (one, time) not in self.changes:
            yield end + 700, self.revise(one, time, end + 600), True

    def _chance(self, share: float) -> bool:
        return self.random.random() < share


@dataclass
class PipelineHarness:
    """A desk on a venue and a state file, and what it said."""

    desk: IntakePipeline
    saved_bars: SavedBars
    state: State
    venue: FakeVenue
    clock: Clock
    metrics: Metrics
    due: list[ForecastRequest] = field(default_factory=list)
    dead_letters: list[str] = field(default_factory=list)

    async def wait_for_bars(self, bars: float) -> None:
        """Until that many bars of the first series after START have closed."""
        step = self.venue.series[0].timeframe.milliseconds or 0
        await self.clock.sleep_until(START + round(bars * step))


@asynccontextmanager
async def running_pipeline(
    path: Path,
    venue: FakeVenue,
    *,
    seed: int = 0,
    degraded: Literal["forecast", "skip"] = "forecast",
    catch_up: Literal["newest", "all"] = "all",
    series: Sequence[Series] | None = None,
) -> AsyncIterator[PipelineHarness]:
    """Open for business; what is not saved at the end is lost, as in a kill."""
    clock, metrics = venue.clock, Metrics()
    state = await State.open(path / "state.sqlite")
    here: PipelineHarness

    def due(one: ForecastRequest) -> None:
        assert clock.now() >= one.close, "due before its close"
        here.due.append(one)

    saved_bars = SavedBars(state, clock, metrics, lookback=LOOKBACK, degraded=degraded)
    desk = IntakePipeline(
        {"binance": venue},
        saved_bars,
        due,
        clock,
        Random(seed),
        metrics,
        catch_up=catch_up,
        dead_letter=lambda _, reason, __: here.dead_letters.append(reason),
    )
    here = PipelineHarness(desk, saved_bars, state, venue, clock, metrics)
    try:
        await desk.follow(venue.series if series is None else series)
        async with asyncio.TaskGroup() as tasks:
            work = [
                tasks.create_task(desk.run()),
                tasks.create_task(venue.run(desk.callbacks("binance"))),
            ]
            yield here
            for task in work:
                task.cancel()
    finally:
        await state.close()


def make_venue(
    timeframe: str = "10s", *, symbols: int = 1, seed: int = 0, faults: VenueFaults | None = None
) -> FakeVenue:
    series = [Series.parse(f"binance:S{i}/USDT:{timeframe}") for i in range(symbols)]
    return FakeVenue(series, LoopClock(START + 1_234), Random(seed), faults or VenueFaults())


def bar_times(dues: Sequence[ForecastRequest]) -> list[int]:
    return [one.origin for one in dues]


def test_each_bar_is_due_once_right_after_its_close(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_pipeline(tmp_path, make_venue(symbols=3)) as here:
            await here.wait_for_bars(20.1)
            step = 10_000
            for one in here.venue.series:
                dues = [due for due in here.due if due.series == one]
                assert bar_times(dues) == [START + step * i for i in range(20)]
                assert all(due.skip_reason is None for due in dues)
            window = await here.saved_bars.window(here.due[-1])
            assert window is not None
            assert window.values.shape == (LOOKBACK, 6)
            assert window.reasons == ()
            # One question for the beginning, and none since.
            assert len(here.venue.history_requests) == 3

    run_virtual(main())


async def check(here: PipelineHarness, *, until: int, since: int = START) -> None:
    """Compare what is saved with the venue's truth, and what was due with what is saved."""
    for one in here.venue.series:
        step = one.timeframe.milliseconds or 0
        bars = await here.state.load(one, 10_000)
        times = [bar.candle.time for bar in bars]
        assert times == list(range(times[0], times[-1] + 1, step))
        assert times[-1] >= until
        for bar in bars:
            true = here.venue.bar(one, bar.candle.time)
            if true is None:
                assert bar.synthetic
                assert bar.candle.volume == 0
            else:
                assert bar.candle == true
                assert not bar.synthetic
        dues = [due for due in here.due if due.series == one]
        places = [(due.origin, due.revision) for due in dues]
        assert places == sorted(set(places))
        assert sorted(set(bar_times(dues))) == [time for time in times if time >= since]


def random_faults(dice: Random) -> VenueFaults:
    """A mixture of troubles, few to many."""
    level = dice.choice((0.02, 0.1, 0.4))

    def share() -> float:
        return dice.choice((0, 0, 1)) * dice.random() * level

    return VenueFaults(
        drop=share(),
        drop_final=share() * 2,
        duplicate=share(),
        late=share(),
        revise=share(),
        premature_close=share(),
        invalid=share(),
        reject_requests=share(),
        empty_bars=share() / 4,
        lag_seconds=dice.choice((0, 0, 0.5, 2)),
        push_outage=dice.choice(((0, 0), (10, 14), (20, 60))),
        rest_outage=dice.choice(((0, 0), (10, 12), (-90, 3))),
    )


@pytest.mark.parametrize("seed", range(20))
def test_whatever_goes_wrong_the_tape_ends_as_the_truth(tmp_path: Path, seed: int) -> None:
    dice = Random(seed)
    faults = random_faults(dice)
    timeframe = dice.choice(("5s", "10s", "1m"))

    async def main() -> None:
        venue = make_venue(timeframe, symbols=2, seed=seed, faults=faults)
        async with running_pipeline(tmp_path, venue, seed=seed) as here:
            step = here.venue.series[0].timeframe.milliseconds or 0
            await here.wait_for_bars(100)
            here.venue.faults = VenueFaults(empty_bars=faults.empty_bars)
            # Two audits on, what was changed without a push is known as well.
            await here.clock.sleep(45 * 60)
            await here.desk.drain()
            end = here.clock.now() - 15_000 - 2 * step
            await check(here, until=end)

    run_virtual(main())


@pytest.mark.parametrize("seed", range(8))
def test_killed_at_any_moment_no_bar_is_lost_or_settled_twice(tmp_path: Path, seed: int) -> None:
    """Outcomes are recorded for some of what was due; the rest is due again after the kill."""
    dice = Random(seed)
    faults = random_faults(dice)
    step = 10_000

    async def main() -> None:
        venue = make_venue(seed=seed, faults=faults)
        (one,) = venue.series
        settled: list[tuple[int, int]] = []
        for life in range(8):
            async with running_pipeline(tmp_path, venue, seed=seed + life) as here:
                await here.clock.sleep(dice.choice((0, 0.01, 3, 30, 200, 700)))
                places = [(due.origin, due.revision) for due in here.due]
                assert places == sorted(set(places))
                # A revision is due after its bar had an outcome, nothing else is due again.
                assert not set(places) & set(settled)
                done = here.due[: dice.randrange(len(here.due) + 1)]
                settled += [(due.origin, due.revision) for due in done]
                outcomes = [
                    Outcome(due.series.name, due.origin, due.revision, "forecast") for due in done
                ]
                await here.state.record(outcomes, [])
            await venue.clock.sleep(dice.choice((0, 5, 100)))
        venue.faults = VenueFaults(empty_bars=faults.empty_bars)
        async with running_pipeline(tmp_path, venue, seed=seed) as here:
            await here.clock.sleep(40 * 60)
            settled += [(due.origin, due.revision) for due in here.due]
            bars = await here.state.load(one, 10_000)
            times = [bar.candle.time for bar in bars if bar.candle.time >= START]
            assert times == list(range(START, times[-1] + 1, step))
            assert times[-1] >= here.clock.now() - 2 * step - 15_000
            assert sorted({origin for origin, _ in settled}) == times
            for bar in bars:
                true = venue.bar(one, bar.candle.time)
                assert bar.synthetic if true is None else bar.candle == true

    run_virtual(main())


def test_after_a_restart_only_what_is_missing_is_asked_for(tmp_path: Path) -> None:
    async def main() -> None:
        venue = make_venue("1m")
        (one,) = venue.series
        async with running_pipeline(tmp_path, venue) as here:
            await here.wait_for_bars(3.1)
            await record(here)
        venue.history_requests.clear()
        await venue.clock.sleep(5 * 60)
        async with running_pipeline(tmp_path, venue) as here:
            await here.clock.sleep(1)
            minute = 60_000
            assert venue.history_requests == [(one, START + 3 * minute, START + 8 * minute)]
            assert bar_times(here.due) == [START + i * minute for i in range(3, 8)]
            await here.wait_for_bars(9.1)
            assert len(here.due) == 6
            assert all(due.skip_reason is None for due in here.due)
            window = await here.saved_bars.window(here.due[0])
            assert window is not None
            assert len(window.times) == LOOKBACK

    run_virtual(main())


async def record(here: PipelineHarness) -> None:
    """Let everything that was due have its outcome."""
    outcomes = [
        Outcome(due.series.name, due.origin, due.revision, "skipped", "stale") for due in here.due
    ]
    await here.state.record(outcomes, [])


@pytest.mark.parametrize("catch_up", ["newest", "all"])
def test_after_a_long_absence(tmp_path: Path, catch_up: Literal["newest", "all"]) -> None:
    async def main() -> None:
        venue = make_venue()
        (one,) = venue.series
        async with running_pipeline(tmp_path, venue) as here:
            await here.wait_for_bars(3.1)
            await record(here)
        await venue.clock.sleep(86_400)
        async with running_pipeline(tmp_path, venue, catch_up=catch_up) as here:
            begun = here.clock.now()
            await here.clock.sleep(60)
            bars = (here.clock.now() - START) // 10_000
            if catch_up == "all":
                assert bar_times(here.due) == [START + i * 10_000 for i in range(3, bars)]
            else:
                # What lies further back than a context is not history that matters.
                assert all(due.close > begun for due in here.due)
                assert 5 <= len(here.due) <= 6
            window = await here.saved_bars.window(here.due[-1])
            assert window is not None
            assert len(window.times) == LOOKBACK
            assert (np.diff(window.times) == 10_000).all()
            assert window.values[0, 4] == here.venue.bar(one, int(window.times[0])).volume  # type: ignore[union-attr]

    run_virtual(main())


def test_saved_bars_without_an_outcome_are_due_again_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        venue = make_venue()
        async with running_pipeline(tmp_path, venue) as here:
            await here.wait_for_bars(200.1)
            first = here.due[:20]
            here.due[:] = first
            await record(here)
        async with running_pipeline(tmp_path, venue) as here:
            # More of them than a context holds.
            assert bar_times(here.due) == [START + i * 10_000 for i in range(20, 200)]
            window = await here.saved_bars.window(here.due[0])
            assert window is not None
            assert window.last.time == here.due[0].origin
            assert len(window.times) == LOOKBACK

    run_virtual(main())


def test_a_revision_of_the_newest_bar_is_due_again_even_after_a_kill(tmp_path: Path) -> None:
    async def main() -> None:
        venue = make_venue("1m")
        (one,) = venue.series
        async with running_pipeline(tmp_path, venue) as here:
            await here.wait_for_bars(2.01)
            await record(here)
            here.due.clear()
            changed = venue.revise(one, START + 60_000, here.clock.now())
            intake = here.desk.callbacks("binance")
            intake.update(Update(one, changed, True, here.clock.now()))  # noqa: FBT003
            await here.clock.sleep(1)
            assert [(due.origin, due.revision) for due in here.due] == [(START + 60_000, 1)]
            window = await here.saved_bars.window(here.due[0])
            assert window is not None
            assert (window.revision, window.last) == (1, changed)
        async with running_pipeline(tmp_path, venue) as here:
            assert [(due.origin, due.revision) for due in here.due] == [(START + 60_000, 1)]
            await record(here)
        async with running_pipeline(tmp_path, venue) as here:
            assert here.due == []

    run_virtual(main())


@pytest.mark.parametrize("degraded", ["forecast", "skip"])
def test_a_hole_that_cannot_be_filled(
    tmp_path: Path, degraded: Literal["forecast", "skip"]
) -> None:
    async def main() -> None:
        faults = VenueFaults(push_outage=(10, 12), rest_outage=(10, 60))
        async with running_pipeline(tmp_path, make_venue(faults=faults), degraded=degraded) as here:
            await here.wait_for_bars(15.5)
            assert len(here.due) == 10  # held
            assert here.saved_bars.outstanding_bars(START + 160_000) == 0
            await here.wait_for_bars(40.5)
            assert bar_times(here.due) == [START + i * 10_000 for i in range(40)]
            last = here.due[-1]
            window = await here.saved_bars.window(last)
            assert window is not None
            assert window.reasons == ("2 missing bars",)
            assert last.skip_reason == ("gap" if degraded == "skip" else None)
            assert here.saved_bars.outstanding_bars(START + 410_000) == 1
            # REST is back: the hole is filled, and the windows are whole again.
            await here.wait_for_bars(70.5)
            window = await here.saved_bars.window(here.due[-1])
            assert window is not None
            assert window.reasons == ()
            assert here.due[-1].skip_reason is None
            await check(here, until=START + 69 * 10_000)

    run_virtual(main())


def test_silence_of_one_symbol_among_live_ones(tmp_path: Path) -> None:
    async def main() -> None:
        venue = make_venue("1m", symbols=3)
        mute = venue.series[1]
        async with running_pipeline(tmp_path, venue) as here:
            await here.wait_for_bars(3.5)
            venue.suspensions[mute] = START + 4 * 60_000, START + 9 * 60_000
            assert here.saved_bars.outstanding_bars(START + 5 * 60_000) == 0
            await here.wait_for_bars(4.5)
            assert here.saved_bars.outstanding_bars(START + 5 * 60_000) == 3
            await here.wait_for_bars(5.5)
            # Its bar is past its grace; nobody waits for it any more.
            assert here.saved_bars.outstanding_bars(START + 5 * 60_000) == 0
            assert b'silent_series{venue="binance"} 1.0' in here.metrics.render()
            assert here.saved_bars.outstanding_bars(START + 6 * 60_000) == 2
            others = [due for due in here.due if due.series != mute]
            assert len(others) == 10
            await here.wait_for_bars(12.5)
            assert b'silent_series{venue="binance"} 0.0' in here.metrics.render()
            # What it did not have is flat, and was due all the same.
            dues = [due for due in here.due if due.series == mute]
            assert bar_times(dues) == [START + i * 60_000 for i in range(12)]
            window = await here.saved_bars.window(dues[-1])
            assert window is not None
            assert window.synthetic == 5
            await check(here, until=START + 11 * 60_000)

    run_virtual(main())


def test_a_new_listing_warms_up_and_is_forecast_before_its_lookback_is_full(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        venue = make_venue()
        venue.first = START - 28 * 10_000
        async with running_pipeline(tmp_path, venue) as here:
            await here.wait_for_bars(10.5)
            obstacles = [due.skip_reason for due in here.due]
            assert obstacles == ["warming up"] * 3 + [None] * 7
            window = await here.saved_bars.window(here.due[-1])
            assert window is not None
            assert len(window.times) == 38
            await record(here)
        async with running_pipeline(tmp_path, venue) as here:
            # The same after a restart, once the venue has said that there is no more.
            await here.wait_for_bars(12.5)
            assert [due.skip_reason for due in here.due] == [None, None]

    run_virtual(main())


def test_a_longer_lookback_after_a_restart_is_filled_from_the_venue(tmp_path: Path) -> None:
    async def main() -> None:
        venue = make_venue()
        (one,) = venue.series
        state = await State.open(tmp_path / "state.sqlite")
        saved = [START - i * 10_000 for i in range(12, 2, -1)]
        candles = [venue.bar(one, time) for time in saved]
        await state.save_bars([(one, Bar(c, received=1)) for c in candles if c is not None])
        await state.init_watermark(one, saved[-3])
        await state.close()
        async with running_pipeline(tmp_path, venue) as here:
            await here.wait_for_bars(2.5)
            assert bar_times(here.due) == [START + i * 10_000 for i in range(-4, 2)]
            assert all(due.skip_reason is None for due in here.due)
            window = await here.saved_bars.window(here.due[0])
            assert window is not None
            assert len(window.times) == LOOKBACK

    run_virtual(main())


def test_the_set_of_series_changes_without_a_bar_of_the_others_lost(tmp_path: Path) -> None:
    async def main() -> None:
        venue = make_venue(symbols=3)
        first, second, third = venue.series
        async with running_pipeline(tmp_path, venue, series=[first, second]) as here:
            await here.wait_for_bars(5.5)
            await here.desk.follow([second, third])
            await here.wait_for_bars(10.5)
            await here.desk.follow([first, second, third])
            await here.wait_for_bars(15.5)
            came: dict[Series, list[int]] = {one: [] for one in venue.series}
            for due in here.due:
                came[due.series].append((due.origin - START) // 10_000)
            assert came[first] == list(range(15))
            assert came[second] == list(range(15))
            assert came[third] == list(range(5, 15))
            assert here.saved_bars.outstanding_bars(START + 160_000) == 3

    run_virtual(main())


def test_settled_means_saved_and_handed_on(tmp_path: Path) -> None:
    async def main() -> None:
        venue = make_venue()
        (one,) = venue.series
        venue.pushes = False
        async with running_pipeline(tmp_path, venue) as here:
            await here.wait_for_bars(1)
            final = venue.bar(one, START)
            assert final is not None
            here.desk.callbacks("binance").update(Update(one, final, True, here.clock.now()))  # noqa: FBT003
            assert here.due == []
            await here.desk.drain()
            assert bar_times(here.due) == [START]
            assert (await here.state.load(one, 1))[0].candle == final

    run_virtual(main())


def test_bad_frames_and_candles_are_buried_with_a_reason(tmp_path: Path) -> None:
    async def main() -> None:
        venue = make_venue(faults=VenueFaults(invalid=1))
        async with running_pipeline(tmp_path, venue) as here:
            here.desk.callbacks("binance").reject(None, "not JSON", b"{")
            await here.wait_for_bars(5.5)
            assert here.dead_letters[0] == "not JSON"
            assert len(here.dead_letters) == 1 + 6  # once per bar
            assert "reported closed" in here.dead_letters[1]
            assert bar_times(here.due) == [START + i * 10_000 for i in range(5)]

    run_virtual(main())


def test_a_disk_that_cannot_keep_up_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kronos_stream.daemon.intake.save_queue._HARD_LIMIT", 50)

    async def stuck(*_: object) -> None:
        await asyncio.sleep(10_000)

    async def main() -> None:
        venue = make_venue()
        async with running_pipeline(tmp_path, venue) as here:
            monkeypatch.setattr(here.state, "save_bars", stuck)
            await here.clock.sleep(10_000)

    with pytest.raises(ExceptionGroup) as caught:
        run_virtual(main())
    assert caught.group_contains(StateError, match="faster disk")
