"""The desk: whatever a venue does, every closed bar is saved and due once, in order, not early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from kronos_stream.daemon.desk import Desk
from kronos_stream.daemon.due import Due
from kronos_stream.daemon.metrics import Metrics
from kronos_stream.daemon.state import State
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.clock import Clock, LoopClock
from kronos_stream.market.series import Series
from kronos_stream.market.source import Intake, SourceError, Traits
from kronos_stream.testing.virtual import run_virtual

START = 1_718_712_000_000
LOOKBACK = 40


@dataclass
class Faults:
    """Shares of pushes, or of answers, that go wrong."""

    lose: float = 0
    lose_last: float = 0
    double: float = 0
    late: float = 0
    revise: float = 0
    lie: float = 0
    absurd: float = 0
    refuse: float = 0
    lag_seconds: float = 0
    quiet: float = 0
    """Share of bars that the venue does not have."""
    cut: tuple[int, int] = (0, 0)
    """Bars from and before which nothing is pushed."""
    down: tuple[int, int] = (0, 0)
    """Bars from and before which REST is not there."""


@dataclass
class Venue:
    """A venue of one process: a truth of bars, told with seeded faults."""

    series: Sequence[Series]
    clock: Clock
    random: Random
    faults: Faults = field(default_factory=Faults)
    traits: Traits = field(default_factory=lambda: Traits(fills_empty=True))
    venue: str = "binance"
    asked: list[tuple[Series, int, int]] = field(default_factory=list)
    truth: dict[Series, dict[int, Candle]] = field(default_factory=dict)
    first: int = 0
    """Open of the first bar that the venue has."""
    pushes: bool = True

    async def unknown(self, series: Collection[Series]) -> Mapping[Series, str]:  # noqa: ARG002
        return {}

    def follow(self, series: Collection[Series]) -> None:
        self.series = list(series)

    async def close(self) -> None:
        pass

    def bar(self, series: Series, time: int) -> Candle | None:
        """The venue's present word on a bar."""
        known = self.truth.setdefault(series, {})
        if time < self.first:
            return None
        if time not in known:
            dice = Random(f"{series} {time}")
            if dice.random() < self.faults.quiet:
                return None
            opened, close = (100 + dice.randrange(1000) / 100 for _ in range(2))
            high, low = max(opened, close) + 1, min(opened, close) - 1
            known[time] = Candle(time, opened, high, low, close, dice.randrange(1, 99), 5.0)
        return known[time]

    def revised(self, series: Series, time: int) -> Candle:
        bar = self.bar(series, time)
        assert bar is not None
        changed = self.truth[series][time] = bar._replace(volume=bar.volume + 1000)
        return changed

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        self.asked.append((series, start, end))
        await self.clock.sleep(0.05)
        now, step = self.clock.now(), series.timeframe.milliseconds or 0
        bar = (now - START) // step
        if self.faults.down[0] <= bar < self.faults.down[1]:
            raise SourceError("down")
        if self.random.random() < self.faults.refuse:
            raise SourceError("try again", retry_after=self.random.choice((0, 3)))
        end = min(end, now - round(1000 * self.faults.lag_seconds) - step + 1)
        bars = (self.bar(series, time) for time in range(start + -start % step, end, step))
        return [bar for bar in bars if bar is not None]

    async def run(self, intake: Intake) -> None:
        async with asyncio.TaskGroup() as tasks:
            for one in self.series:
                tasks.create_task(self._push(intake, one))

    async def _push(self, intake: Intake, one: Series) -> None:
        step = one.timeframe.milliseconds or 0
        time = self.clock.now() // step * step
        async with asyncio.TaskGroup() as tasks:

            async def tell(candle: Candle, moment: int, late: float, *, closed: bool) -> None:
                await self.clock.sleep_until(moment)
                await self.clock.sleep(late)
                intake.update(Update(one, candle, closed, self.clock.now()))

            while True:
                for moment, candle, closed in self._said(one, time):
                    late = self.random.uniform(0, 1.5) if self._happens(self.faults.late) else 0
                    for _ in range(2 if self._happens(self.faults.double) else 1):
                        tasks.create_task(tell(candle, moment, late, closed=closed))
                        late += self.random.uniform(0, 3)
                time += step
                await self.clock.sleep_until(time)

    def _said(self, one: Series, time: int) -> Iterator[tuple[int, Candle, bool]]:
        """What is pushed of a bar, and when."""
        faults, step = self.faults, one.timeframe.milliseconds or 0
        final = self.bar(one, time)
        bar = (time - START) // step
        if final is None or not self.pushes or faults.cut[0] <= bar < faults.cut[1]:
            return
        for moment in (time + step // 4, time + step * 3 // 4):
            so_far = final._replace(close=final.open, volume=final.volume / 2)
            if not self._happens(faults.lose):
                yield moment, so_far, False
            if self._happens(faults.lie) and step // 4 > 2_000:
                yield moment, so_far, True
            if self._happens(faults.absurd):
                yield moment, final._replace(high=0.5), True
        end = time + step + 20
        if not self._happens(max(faults.lose, faults.lose_last)):
            yield end, final, True
        if self._happens(faults.revise):
            changed = self.revised(one, time)
            yield end + 700, changed, True

    def _happens(self, share: float) -> bool:
        return self.random.random() < share


@dataclass
class House:
    """A desk on a venue and a state file, and what it said."""

    desk: Desk
    state: State
    venue: Venue
    clock: LoopClock
    metrics: Metrics
    due: list[Due] = field(default_factory=list)
    buried: list[str] = field(default_factory=list)

    async def until(self, bars: float) -> None:
        """Until that many bars of the first series after START have closed."""
        step = self.venue.series[0].timeframe.milliseconds or 0
        await self.clock.sleep_until(START + round(bars * step))


@asynccontextmanager
async def house(
    path: Path,
    timeframe: str = "10s",
    *,
    symbols: int = 1,
    seed: int = 0,
    faults: Faults | None = None,
    clock: LoopClock | None = None,
    venue: Venue | None = None,
    degraded: str = "forecast",
    catch_up: str = "all",
) -> AsyncIterator[House]:
    clock = clock or LoopClock(START + 1_234)
    series = [Series.parse(f"binance:S{i}/USDT:{timeframe}") for i in range(symbols)]
    venue = venue or Venue(series, clock, Random(seed), faults or Faults())
    metrics = Metrics()
    state = await State.open(path / "state.sqlite")
    here: House

    def due(one: Due) -> None:
        assert clock.now() >= one.close, "due before its close"
        here.due.append(one)

    desk = Desk(
        {"binance": venue},
        state,
        due,
        clock,
        Random(seed),
        metrics,
        lookback=LOOKBACK,
        catch_up=catch_up,  # type: ignore[arg-type]
        degraded=degraded,  # type: ignore[arg-type]
        bury=lambda _, reason, __: here.buried.append(reason),
    )
    here = House(desk, state, venue, clock, metrics)
    try:
        await desk.start(series)
        async with asyncio.TaskGroup() as tasks:
            work = [
                tasks.create_task(desk.run()),
                tasks.create_task(venue.run(desk.intake("binance"))),
            ]
            yield here
            for task in work:
                task.cancel()
    finally:
        await state.close()


def opens(dues: Sequence[Due]) -> list[int]:
    return [one.origin for one in dues]


def test_each_bar_is_due_once_right_after_its_close(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path, symbols=3) as here:
            await here.until(20.1)
            step = 10_000
            for one in here.venue.series:
                dues = [due for due in here.due if due.series == one]
                assert opens(dues) == [START + step * i for i in range(20)]
                assert all(due.obstacle is None for due in dues)
            window = await here.desk.window(here.due[-1])
            assert window is not None
            assert window.values.shape == (LOOKBACK, 6)
            assert window.reasons == ()
            # One question for the beginning, and none since.
            assert len(here.venue.asked) == 3

    run_virtual(main())


async def check(here: House, *, since: int = START, until: int | None = None) -> None:
    """Compare what is saved with the venue's truth, and what was due with what is saved."""
    for one in here.venue.series:
        step = one.timeframe.milliseconds or 0
        bars = await here.state.load(one, 10_000)
        times = [bar.candle.time for bar in bars]
        assert times == list(range(times[0], times[-1] + 1, step))
        assert until is None or times[-1] >= until
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
        assert sorted(set(opens(dues))) == [time for time in times if time >= since]


def some_faults(dice: Random) -> Faults:
    """A mixture of troubles, few to many."""
    level = dice.choice((0.02, 0.1, 0.4))

    def share() -> float:
        return dice.choice((0, 0, 1)) * dice.random() * level

    return Faults(
        lose=share(),
        lose_last=share() * 2,
        double=share(),
        late=share(),
        revise=share(),
        lie=share(),
        absurd=share(),
        refuse=share(),
        quiet=share() / 4,
        lag_seconds=dice.choice((0, 0, 0.5, 2)),
        cut=dice.choice(((0, 0), (10, 14), (20, 60))),
        down=dice.choice(((0, 0), (10, 12), (-90, 3))),
    )


@pytest.mark.parametrize("seed", range(20))
def test_whatever_goes_wrong_the_tape_ends_as_the_truth(tmp_path: Path, seed: int) -> None:
    dice = Random(seed)
    faults = some_faults(dice)
    timeframe = dice.choice(("5s", "10s", "1m"))

    async def main() -> None:
        async with house(tmp_path, timeframe, symbols=2, seed=seed, faults=faults) as here:
            step = here.venue.series[0].timeframe.milliseconds or 0
            await here.until(100)
            here.venue.faults = Faults(quiet=faults.quiet)
            # Two audits on, what was changed without a push is known as well.
            await here.clock.sleep(45 * 60)
            await here.desk.settled()
            end = here.clock.now() - 15_000 - 2 * step
            await check(here, until=end)

    run_virtual(main())
