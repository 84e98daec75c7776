"""Intake pipeline on a venue with seeded faults, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

from kronos_stream.daemon.intake.pipeline import IntakePipeline
from kronos_stream.daemon.intake.saved_bars import SavedBars
from kronos_stream.daemon.requests import ForecastRequest, Outcome
from kronos_stream.daemon.storage.state import State
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.source import SourceCallbacks, SourceError, Traits
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.clock import Clock, LoopClock
from kronos_stream.market.series import Series

START = 1_718_712_000_000
LOOKBACK = 40


@dataclass
class VenueFaults:
    """Shares of pushes, or of history requests, that are affected by a fault."""

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
    """Bars from and before which history requests fail."""


@dataclass
class FakeVenue:
    """Source with seeded faults. Its true bars depend on series and time only."""

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
    """Times, UTC ms, from and before which a series has no bars."""
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
        """Present version of a bar; None if the venue does not have it."""
        known = self.true_bars.setdefault(series, {})
        since, until = self.suspensions.get(series, (0, 0))
        if time < self.first or since <= time < until:
            return None
        moment, changed = self.changes.get((series, time), (0, None))
        if changed is not None and self.clock.now() >= moment:
            return changed
        if time not in known:
            bar_random = Random(f"{series} {time}")
            if bar_random.random() < self.faults.empty_bars:
                return None
            opened, close = (100 + bar_random.randrange(1000) / 100 for _ in range(2))
            high, low = max(opened, close) + 1, min(opened, close) - 1
            known[time] = Candle(time, opened, high, low, close, bar_random.randrange(1, 99), 5.0)
        return known[time]

    def revise(self, series: Series, time: int, moment: int) -> Candle:
        """Change a bar at that time, UTC ms; return the new version."""
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

    async def _push(self, callbacks: SourceCallbacks, one: Series) -> None:
        step = one.timeframe.milliseconds or 0
        time = self.clock.now() // step * step
        async with asyncio.TaskGroup() as tasks:

            async def push(candle: Candle, moment: int, late: float, *, closed: bool) -> None:
                await self.clock.sleep_until(moment)
                await self.clock.sleep(late)
                callbacks.update(Update(one, candle, closed, self.clock.now()))

            while True:
                for moment, candle, closed in self._pushes_of(one, time):
                    late = self.random.uniform(0, 1.5) if self._chance(self.faults.late) else 0
                    for _ in range(2 if self._chance(self.faults.duplicate) else 1):
                        tasks.create_task(push(candle, moment, late, closed=closed))
                        late += self.random.uniform(0, 3)
                time += step
                await self.clock.sleep_until(time)

    def _pushes_of(self, one: Series, time: int) -> Iterator[tuple[int, Candle, bool]]:
        """Time, candle and closed flag of each push of a bar."""
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
    """A running pipeline, with its requests and dead letters."""

    pipeline: IntakePipeline
    saved_bars: SavedBars
    state: State
    venue: FakeVenue
    clock: Clock
    metrics: Metrics
    requests: list[ForecastRequest] = field(default_factory=list)
    dead_letters: list[str] = field(default_factory=list)

    async def wait_for_bars(self, bars: float) -> None:
        """Wait until that many bars of the first series have closed since START."""
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
    """Run a pipeline on a venue; at the end it is cancelled without a drain, like a crash."""
    clock, metrics = venue.clock, Metrics()
    state = await State.open(path / "state.sqlite")
    harness: PipelineHarness

    def submit(one: ForecastRequest) -> None:
        assert clock.now() >= one.close, "requested before its close"
        harness.requests.append(one)

    saved_bars = SavedBars(state, clock, metrics, lookback=LOOKBACK, degraded=degraded)
    pipeline = IntakePipeline(
        {"binance": venue},
        saved_bars,
        submit,
        clock,
        Random(seed),
        metrics,
        catch_up=catch_up,
        dead_letter=lambda _, reason, __: harness.dead_letters.append(reason),
    )
    harness = PipelineHarness(pipeline, saved_bars, state, venue, clock, metrics)
    try:
        await pipeline.follow(venue.series if series is None else series)
        async with asyncio.TaskGroup() as tasks:
            work = [
                tasks.create_task(pipeline.run()),
                tasks.create_task(venue.run(pipeline.callbacks("binance"))),
            ]
            yield harness
            for task in work:
                task.cancel()
    finally:
        await state.close()


def make_venue(
    timeframe: str = "10s", *, symbols: int = 1, seed: int = 0, faults: VenueFaults | None = None
) -> FakeVenue:
    series = [Series.parse(f"binance:S{i}/USDT:{timeframe}") for i in range(symbols)]
    return FakeVenue(series, LoopClock(START + 1_234), Random(seed), faults or VenueFaults())


def origins(requests: Sequence[ForecastRequest]) -> list[int]:
    return [one.origin for one in requests]


async def assert_state_matches_venue(
    harness: PipelineHarness, *, until: int, since: int = START
) -> None:
    """Assert that saved bars equal those of the venue, and that each was requested."""
    for one in harness.venue.series:
        step = one.timeframe.milliseconds or 0
        bars = await harness.state.load(one, 10_000)
        times = [bar.candle.time for bar in bars]
        assert times == list(range(times[0], times[-1] + 1, step))
        assert times[-1] >= until
        for bar in bars:
            true = harness.venue.bar(one, bar.candle.time)
            if true is None:
                assert bar.synthetic
                assert bar.candle.volume == 0
            else:
                assert bar.candle == true
                assert not bar.synthetic
        requests = [request for request in harness.requests if request.series == one]
        bar_ids = [(request.origin, request.revision) for request in requests]
        assert bar_ids == sorted(set(bar_ids))
        assert sorted(set(origins(requests))) == [time for time in times if time >= since]


async def record_outcomes(harness: PipelineHarness) -> None:
    """Record an outcome for every request."""
    outcomes = [
        Outcome(request.series.name, request.origin, request.revision, "skipped", "stale")
        for request in harness.requests
    ]
    await harness.state.record(outcomes, [])
