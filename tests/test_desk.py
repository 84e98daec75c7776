"""The desk: whatever a venue does, every closed bar is saved and due once, in order, not early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import pytest

from kronos_stream.daemon.desk import Desk
from kronos_stream.daemon.due import Due, Outcome
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
    changed: dict[Series, dict[int, tuple[int, Candle]]] = field(default_factory=dict)
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

    def revised(self, series: Series, time: int) -> None:
        bar = self.bar(series, time)
        if bar is not None:
            self.truth[series][time] = bar._replace(volume=bar.volume + 1000)

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
        faults, dice = self.faults, self.random
        time = self.clock.now() // step * step
        async with asyncio.TaskGroup() as tasks:

            def tell(candle: Candle, *, closed: bool, share: float, moment: int = 0) -> None:
                bar = (candle.time - START) // step
                cut = faults.cut[0] <= bar < faults.cut[1]
                if not self.pushes or cut or dice.random() < share:
                    return
                late = dice.uniform(0, 1.5) if dice.random() < faults.late else 0
                for _ in range(2 if dice.random() < faults.double else 1):
                    tasks.create_task(send(candle, moment, late, closed=closed))
                    late += dice.uniform(0, 3)

            async def send(candle: Candle, moment: int, late: float, *, closed: bool) -> None:
                await self.clock.sleep_until(moment)
                await self.clock.sleep(late)
                intake.update(Update(one, candle, closed, self.clock.now()))

            while True:
                final = self.bar(one, time)
                if final is not None:
                    for part in (1, 3):
                        await self.clock.sleep_until(time + part * step // 4)
                        so_far = final._replace(close=final.open, volume=final.volume / part)
                        tell(so_far, closed=False, share=faults.lose)
                        if dice.random() < faults.lie and step // 4 > 2_000:
                            tell(so_far, closed=True, share=0)
                        if dice.random() < faults.absurd:
                            tell(final._replace(high=0.5), closed=True, share=0)
                    await self.clock.sleep_until(time + step)
                    share = max(faults.lose, faults.lose_last)
                    tell(final, closed=True, share=share, moment=time + step + 20)
                    if dice.random() < faults.revise:
                        self.revised(one, time)
                        tell(self.truth[one][time], closed=True, share=0, moment=time + step + 700)
                await self.clock.sleep_until(time + step)
                time += step


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
