"""The scheduler in virtual time: an outcome for every bar, in order, whatever comes when."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from random import Random
from typing import Any

import numpy as np
import pytest

from kronos_stream.bars.window import Window
from kronos_stream.daemon.inference.protocol import InferenceFailure, InferenceResult
from kronos_stream.daemon.inference.supervisor import BatchResult
from kronos_stream.daemon.requests import ForecastRequest
from kronos_stream.daemon.scheduling.scheduler import CatchUp, ForecastResult, Scheduler
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.forecast.outlook import Outlook
from kronos_stream.forecast.summary import Summary
from kronos_stream.market.candle import Candle
from kronos_stream.market.clock import Clock, LoopClock, ManualClock
from kronos_stream.market.series import Series
from kronos_stream.testing.virtual_time import run_virtual

START = 1_700_000_040_000
"""The open of a minute."""

OUTLOOK = Outlook([], {}, Summary(0.5, 0.0, {}, 0.0, 0.0), 0)


def series(count: int, timeframe: str = "1s") -> list[Series]:
    return [Series.parse(f"test:S{i}/X:{timeframe}") for i in range(count)]


def due_at(
    one: Series, close: int, late: int = 0, revision: int = 0, obstacle: str | None = None
) -> ForecastRequest:
    """The bar of ``one`` that closes at ``close``; its word came ``late`` ms after."""
    return ForecastRequest(
        one, one.timeframe.after(close, -1), revision, close, close + late, obstacle
    )


def window_of(due: ForecastRequest) -> Window:
    candle = Candle(due.origin, 1, 1, 1, 1, 1)
    times = np.array([due.origin])
    return Window(due.series, np.ones((1, 6), np.float32), times, 0, due.revision, candle, ())


class TimedWorker:
    """Takes ``pace`` seconds of the loop's time per series; remembers its batches."""

    def __init__(
        self, pace: float = 0.001, failing: Callable[[Window], bool] | None = None
    ) -> None:
        self.pace = pace
        self.failing = failing or (lambda _: False)
        self.batches: list[tuple[float, list[Window], float]] = []

    def estimate_seconds(self, count: int) -> float:
        return count * self.pace

    def capacity(self, seconds: float) -> int:
        return max(1, int(seconds / self.pace))

    async def forecast(self, windows: Sequence[Window], deadline: float) -> BatchResult:
        self.batches.append((asyncio.get_running_loop().time(), list(windows), deadline))
        await asyncio.sleep(self.pace * len(windows))
        return BatchResult(
            [
                InferenceFailure("no") if self.failing(window) else InferenceResult(OUTLOOK, 1.0)
                for window in windows
            ],
            self.pace * len(windows),
        )

    def sizes(self) -> list[int]:
        return [len(windows) for _, windows, _ in self.batches]


class SchedulerHarness:
    """A scheduler with a timed worker, and what it published."""

    def __init__(
        self,
        worker: TimedWorker | None = None,
        *,
        clock: Clock | None = None,
        window: Callable[[ForecastRequest], Awaitable[Window | None]] | None = None,
        publish_seconds: float = 0.0,
        **settings: Any,
    ) -> None:
        self.clock = clock or LoopClock(START)
        self.worker = worker or TimedWorker()
        self.expected: dict[int, set[Series]] = defaultdict(set)
        self.results: list[ForecastResult] = []
        self.metrics = Metrics()
        self.publish_seconds = publish_seconds
        self.scheduler = Scheduler(
            self.worker,
            window or self._window,
            lambda close: len(self.expected[close]),
            self._publish,
            self.clock,
            self.metrics,
            **settings,
        )

    async def _window(self, due: ForecastRequest) -> Window | None:
        return window_of(due)

    async def _publish(self, results: Sequence[ForecastResult]) -> Sequence[ForecastResult]:
        await asyncio.sleep(self.publish_seconds)
        self.results += results
        return results

    def submit(self, *dues: ForecastRequest) -> None:
        for due in dues:
            self.expected[due.close].discard(due.series)
            self.scheduler.submit(due)

    def outcomes(self) -> list[tuple[str, int, str]]:
        """Symbol, close in seconds after the start, and the outcome, as published."""
        return [
            (
                r.request.series.symbol,
                (r.request.close - START) // 1000,
                r.reason or r.outcome.result,
            )
            for r in self.results
        ]


def run_scenario(
    scenario: Callable[..., Coroutine[Any, Any, None]], **settings: Any
) -> SchedulerHarness:
    """Run ``scenario(bench)`` beside the scheduler; then finish and hand back the bench."""

    async def main() -> SchedulerHarness:
        bench = SchedulerHarness(**settings)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(bench.scheduler.run())
            await scenario(bench)
            await bench.scheduler.drain()
            assert await bench.scheduler.finish(10)
        return bench

    return run_virtual(main())


def test_a_batch_closes_with_the_last_awaited_bar() -> None:
    names = series(3)

    async def scenario(bench: SchedulerHarness) -> None:
        bench.expected[START] = set(names)
        for one in names:
            await asyncio.sleep(0.03)
            bench.submit(due_at(one, START))
        await asyncio.sleep(1)

    ((at, windows, _),) = run_scenario(scenario).worker.batches
    assert len(windows) == 3
    assert at == pytest.approx(0.09)


def test_a_straggler_is_waited_for_a_moment_and_comes_with_the_next() -> None:
    first, second, straggler = series(3)

    async def scenario(bench: SchedulerHarness) -> None:
        bench.expected[START] = {first, second, straggler}
        bench.submit(due_at(first, START))
        await asyncio.sleep(0.2)
        bench.submit(due_at(second, START))
        await asyncio.sleep(0.4)
        bench.submit(due_at(straggler, START))

    batches = run_scenario(scenario).worker.batches
    assert [(round(at, 3), len(windows)) for at, windows, _ in batches] == [(0.25, 2), (0.6, 1)]


def test_a_late_venue_still_makes_one_batch() -> None:
    """The wait counts from the first bar that comes, not from the close."""
    names = series(20)

    async def scenario(bench: SchedulerHarness) -> None:
        bench.expected[START] = set(names)
        await asyncio.sleep(0.9)
        for one in names:
            bench.submit(due_at(one, START, late=900))
            await asyncio.sleep(0.001)

    assert run_scenario(scenario).worker.sizes() == [20]


def test_timeframes_that_close_together_share_a_batch() -> None:
    short, long = series(4, "1s"), series(3, "1m")

    async def scenario(bench: SchedulerHarness) -> None:
        bench.expected[START] = {*short, *long}
        bench.submit(*(due_at(one, START) for one in (*short, *long)))

    bench = run_scenario(scenario)
    assert bench.worker.sizes() == [7]
    assert bench.worker.batches[0][2] == 2  # the stricter deadline


@pytest.mark.parametrize(
    ("timeframe", "deadline"), [("1s", 2), ("5s", 4), ("1m", 48), ("1h", 60), ("1M", 60)]
)
def test_deadline(timeframe: str, deadline: float) -> None:
    async def scenario(bench: SchedulerHarness) -> None:
        bench.submit(due_at(series(1, timeframe)[0], START))

    assert run_scenario(scenario).worker.batches[0][2] == deadline


def test_a_series_slower_than_the_deadline_gets_its_time() -> None:
    async def scenario(bench: SchedulerHarness) -> None:
        bench.submit(*(due_at(one, START) for one in series(2, "1s")))

    bench = run_scenario(scenario, worker=TimedWorker(3.0), catch_up="all")
    assert [deadline for _, _, deadline in bench.worker.batches] == [6, 6]
    assert bench.worker.sizes() == [1, 1]


def test_newest_skips_what_was_overtaken_and_all_works_it_off() -> None:
    (one,) = series(1)

    async def scenario(bench: SchedulerHarness) -> None:
        for second in range(5):
            bench.submit(due_at(one, START + 1000 * second))
            await asyncio.sleep(1)

    newest = run_scenario(scenario, worker=TimedWorker(2.4))
    assert newest.outcomes() == [
        ("S0/X", 0, "forecast"),
        ("S0/X", 1, "overrun"),
        ("S0/X", 2, "forecast"),
        ("S0/X", 3, "overrun"),
        ("S0/X", 4, "forecast"),
    ]
    everything = run_scenario(scenario, worker=TimedWorker(2.4), catch_up="all")
    assert everything.outcomes() == [("S0/X", second, "forecast") for second in range(5)]


def test_several_bars_of_a_series_share_a_batch_when_all_are_wanted() -> None:
    async def scenario(bench: SchedulerHarness) -> None:
        for close in range(3):
            bench.submit(*(due_at(one, START + 1000 * close) for one in series(2)))

    bench = run_scenario(
        scenario, catch_up="all", worker=TimedWorker(0.2)
    )  # five fit half the deadline
    ((_, first, _), (_, second, _)) = bench.worker.batches
    assert [w.series.symbol for w in first] == ["S0/X", "S1/X", "S0/X", "S1/X", "S0/X"]
    assert [w.series.symbol for w in second] == ["S1/X"]


def test_after_an_outage_the_newest_bar_may_be_stale() -> None:
    """Its forecast would have ended before it came; who wants all gets it all the same."""
    (one,) = series(1)

    async def scenario(bench: SchedulerHarness) -> None:
        await asyncio.sleep(10)
        bench.submit(due_at(one, START + 7_000), due_at(one, START + 8_000))

    assert run_scenario(scenario).outcomes() == [("S0/X", 7, "overrun"), ("S0/X", 8, "stale")]
    everything = run_scenario(scenario, catch_up="all")
    assert everything.outcomes() == [("S0/X", 7, "forecast"), ("S0/X", 8, "forecast")]


@pytest.mark.parametrize("catch_up", ["newest", "all"])
def test_revisions(catch_up: CatchUp) -> None:
    """One that overtakes a waiting bar replaces it; a bar forecast already is forecast again."""
    one, other = series(2, "1m")

    async def scenario(bench: SchedulerHarness) -> None:
        bench.expected[START] = {other}
        bench.submit(due_at(one, START), due_at(one, START, revision=1), due_at(other, START))
        await asyncio.sleep(0.5)
        bench.submit(due_at(one, START, revision=2))
        await asyncio.sleep(0.5)
        bench.submit(due_at(one, START, revision=3))

    results = run_scenario(scenario, worker=TimedWorker(0.4), catch_up=catch_up).results
    said = [(r.request.revision, r.reason) for r in results if r.request.series == one]
    assert said == [(0, "revised"), (1, ""), (2, ""), (3, "")]


def test_obstacles_keep_their_place() -> None:
    """At once where nothing is before them, else behind the bar that is being forecast."""
    busy, idle = series(2)

    async def scenario(bench: SchedulerHarness) -> None:
        bench.submit(due_at(busy, START))
        await asyncio.sleep(0.1)
        bench.submit(due_at(busy, START + 1000, obstacle="gap"))
        bench.submit(due_at(idle, START + 1000, obstacle="warming up"))
        await asyncio.sleep(0.1)
        assert bench.outcomes() == [("S1/X", 1, "warming up")]

    bench = run_scenario(scenario, worker=TimedWorker(1.0))
    assert bench.outcomes()[1:] == [("S0/X", 0, "forecast"), ("S0/X", 1, "gap")]


def test_what_cannot_be_forecast_fails_alone() -> None:
    gone, bad, good = series(3)

    async def window(due: ForecastRequest) -> Window | None:
        return None if due.series == gone else window_of(due)

    async def scenario(bench: SchedulerHarness) -> None:
        bench.submit(*(due_at(one, START) for one in (gone, bad, good)))

    bench = run_scenario(
        scenario, worker=TimedWorker(failing=lambda w: w.series == bad), window=window
    )
    assert sorted(bench.outcomes()) == [
        ("S0/X", 0, "gap"),
        ("S1/X", 0, "failed"),
        ("S2/X", 0, "forecast"),
    ]
    assert bench.metrics.outcomes.labels("skipped", "failed")._value.get() == 1


def test_counts_are_of_what_was_published() -> None:
    kept, gone = series(2)

    async def scenario(bench: SchedulerHarness) -> None:
        async def publish(results: Sequence[ForecastResult]) -> Sequence[ForecastResult]:
            return [one.as_removed if one.request.series == gone else one for one in results]

        bench.scheduler._publish = publish
        bench.submit(*(due_at(one, START) for one in (kept, gone)))

    outcomes = run_scenario(scenario).metrics.outcomes
    assert outcomes.labels("forecast", "")._value.get() == 1
    assert outcomes.labels("skipped", "removed")._value.get() == 1


def test_latencies() -> None:
    first, second = series(2)

    async def scenario(bench: SchedulerHarness) -> None:
        bench.expected[START] = {second}
        await asyncio.sleep(0.1)
        bench.submit(due_at(first, START, late=100))
        await asyncio.sleep(0.05)
        bench.submit(due_at(second, START, late=150))

    results = run_scenario(scenario, worker=TimedWorker(0.2)).results
    assert [(r.queued_ms, r.compute_ms) for r in results] == [(50, 400), (0, 400)]


def test_settled_waits_for_nobody() -> None:
    """In a replay time stands until all is settled: no straggler can be waited for."""
    here, absent = series(2)

    async def main() -> list[tuple[str, int, str]]:
        bench = SchedulerHarness(clock=ManualClock(START))
        running = asyncio.create_task(bench.scheduler.run())
        bench.expected[START] = {absent}
        bench.submit(due_at(here, START))
        async with asyncio.timeout(5):
            await bench.scheduler.drain()
        running.cancel()
        return bench.outcomes()

    assert run_virtual(main()) == [("S0/X", 0, "forecast")]


def test_a_failing_publisher_ends_the_run() -> None:
    async def main() -> None:
        bench = SchedulerHarness()

        async def full(_: Sequence[ForecastResult]) -> Sequence[ForecastResult]:
            raise OSError("disk full")

        bench.scheduler._publish = full
        bench.submit(due_at(series(1)[0], START))
        await bench.scheduler.run()

    with pytest.raises(ExceptionGroup, match="unhandled") as caught:
        run_virtual(main())
    assert caught.group_contains(OSError, match="disk full")


def test_finish_ends_the_batch_in_hand_and_leaves_the_rest() -> None:
    busy, waiting = series(2)

    async def main() -> list[tuple[str, int, str]]:
        bench = SchedulerHarness(TimedWorker(2.0))
        running = asyncio.create_task(bench.scheduler.run())
        bench.submit(due_at(busy, START))
        await asyncio.sleep(0.5)
        bench.submit(due_at(waiting, START), due_at(busy, START + 1000))
        assert await bench.scheduler.finish(5)
        bench.submit(due_at(waiting, START + 1000))
        await running
        return bench.outcomes()

    assert run_virtual(main()) == [("S0/X", 0, "forecast")]


def test_finish_is_bounded() -> None:
    async def main() -> float:
        bench = SchedulerHarness(TimedWorker(100.0))
        running = asyncio.create_task(bench.scheduler.run())
        bench.submit(due_at(series(1)[0], START))
        await asyncio.sleep(1)
        assert not await bench.scheduler.finish(5)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        assert bench.results == []
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == pytest.approx(6)


def test_others_have_their_turn_while_windows_are_built() -> None:
    turns = 0

    async def scenario(bench: SchedulerHarness) -> None:
        nonlocal turns
        bench.submit(*(due_at(one, START) for one in series(1000, "1m")))
        while not bench.worker.batches:
            turns += 1
            await asyncio.sleep(0)

    run_scenario(scenario)
    assert turns > 25


def test_a_backlog_has_an_end() -> None:
    (one,) = series(1)

    async def scenario(bench: SchedulerHarness) -> None:
        bench.submit(*(due_at(one, START + 1000 * i) for i in range(50)))

    said = run_scenario(scenario, catch_up="all", max_backlog=20).outcomes()
    assert [what for _, _, what in said] == ["overrun"] * 30 + ["forecast"] * 20


def test_overload_starves_nobody() -> None:
    """A hundred series, twenty forecasts a second: each has its turn every few seconds."""
    names = series(100)

    async def scenario(bench: SchedulerHarness) -> None:
        for second in range(60):
            bench.submit(*(due_at(one, START + 1000 * second) for one in names))
            await asyncio.sleep(1)

    bench = run_scenario(scenario, worker=TimedWorker(0.05))
    taken = defaultdict(list)
    for at, windows, _ in bench.worker.batches:
        for window in windows:
            taken[window.series].append(at)
    assert len(taken) == 100
    for times in taken.values():
        assert max(np.diff([0, *times, 60])) < 8
    assert len(bench.results) == 6000
    forecast = sum(not result.reason for result in bench.results)
    assert forecast > 60 * 20 * 0.8
    assert {result.reason for result in bench.results} == {"", "overrun"}


def busy_at(worker: TimedWorker, moment: float) -> bool:
    """Whether a batch was being drawn just before ``moment`` seconds."""
    return any(
        at < moment <= at + worker.pace * len(windows) + 0.01 for at, windows, _ in worker.batches
    )


class RandomFeed:
    """Bars of several series as venues may send them: late, twice, changed, hindered."""

    def __init__(self, random: Random) -> None:
        timeframes = random.choices(["1s", "2s", "10s"], k=random.randint(1, 30))
        self.names = [Series.parse(f"test:S{i}/X:{tf}") for i, tf in enumerate(timeframes)]
        self.submitted: dict[Series, list[ForecastRequest]] = defaultdict(list)
        self.moments: dict[ForecastRequest, float] = {}
        self._random = random
        self._lateness = random.choice([0.02, 0.3, 1.2])

    async def __call__(self, bench: SchedulerHarness) -> None:
        for second in range(1, 21):
            bench.expected[START + 1000 * second] = {
                one for one in self.names if 1000 * second % one.timeframe.after(0) == 0
            }
        async with asyncio.TaskGroup() as tasks:
            for one in self.names:
                tasks.create_task(self._play(bench, one))

    async def _play(self, bench: SchedulerHarness, one: Series) -> None:
        random, close = self._random, START
        while close < START + 20_000:
            close = one.timeframe.after(close)
            late = int(1000 * self._lateness * random.random())
            if random.random() < 0.05:
                late += random.randint(500, 4000)
            await bench.clock.sleep_until(close + late)
            obstacle = "gap" if random.random() < 0.05 else None
            for revision in range(1 + (random.random() < 0.1)):
                due = due_at(one, close, bench.clock.now() - close, revision, obstacle)
                self.submitted[one].append(due)
                self.moments[due] = asyncio.get_running_loop().time()
                bench.submit(due)
                await asyncio.sleep(random.choice([0, 0, 0.05, 0.6]))

    def later_requests(self, due: ForecastRequest) -> list[ForecastRequest]:
        """The later bars of its series, and its own later revisions."""
        own = self.submitted[due.series]
        return own[own.index(due) + 1 :]


@pytest.mark.parametrize("catch_up", ["newest", "all"])
@pytest.mark.parametrize("seed", range(12))
def test_every_bar_has_one_outcome_in_order(seed: int, catch_up: CatchUp) -> None:
    """Random arrivals, obstacles, revisions, outages and speeds; and no outcome is a lie."""
    random = Random(seed)
    feed = RandomFeed(random)
    worker = TimedWorker(random.choice([0.001, 0.02, 0.2, 1.5]), lambda _: random.random() < 0.02)
    bench = run_scenario(
        feed, worker=worker, publish_seconds=random.choice([0.0, 0.01, 0.5]), catch_up=catch_up
    )
    published = defaultdict(list)
    for result in bench.results:
        published[result.request.series].append(result.request)
    assert published == feed.submitted
    batched = {
        (window.series, int(window.times[-1]), window.revision): at
        for at, windows, _ in worker.batches
        for window in windows
    }
    assert len(batched) == sum(worker.sizes())
    for _, windows, deadline in worker.batches:
        assert len(windows) * worker.pace <= deadline / 2
    for result in bench.results:
        at = batched.get((result.request.series, result.request.origin, result.request.revision))
        assert (at is not None) == (result.reason in ("", "failed"))
        check_outcomes(result, at, feed, bench, catch_up)


def check_outcomes(
    result: ForecastResult,
    at: float | None,
    feed: RandomFeed,
    bench: SchedulerHarness,
    catch_up: CatchUp,
) -> None:
    """Whether what is said of a bar is so; ``at``: seconds when its batch was formed, if any."""
    due, overtakers = result.request, feed.later_requests(result.request)
    expiry = (due.series.timeframe.after(due.close) - START) / 1000
    match result.reason:
        case "gap":
            assert due.skip_reason == "gap"
        case "revised":
            assert overtakers[0].origin == due.origin
        case "overrun":
            assert catch_up == "newest"
            assert overtakers or busy_at(bench.worker, expiry)
        case "stale":
            assert catch_up == "newest"
            assert feed.moments[due] >= expiry
        case _:
            assert at is not None
            if catch_up == "newest":
                assert at < expiry
                assert not any(feed.moments[other] < at - 1e-6 for other in overtakers)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_taken_back_and_given_again_keeps_its_order(seed: int) -> None:
    """As when a group shares out anew: nothing twice, nothing before what comes before it."""
    random = Random(seed)
    *names, absent = series(6)
    given: dict[Series, list[ForecastRequest]] = defaultdict(list)

    async def scenario(bench: SchedulerHarness) -> None:
        for second in range(1, 161):
            bench.expected[START + 1000 * second] = {absent} if random.random() < 0.5 else set()
        for second in range(1, 41):
            for one in random.sample(names, random.randint(0, 5)):
                # Bars that come late and early make closes that are complete in another order.
                for _ in range(random.randint(1, 3)):
                    before = given[one][-1].close if given[one] else START
                    given[one].append(due_at(one, before + 1000))
                    bench.submit(given[one][-1])
            await asyncio.sleep(random.choice([0, 0.05, 0.3, 1.0]))
            if second % 4 == 0:
                bench.scheduler.cancel_waiting()
                await bench.scheduler.drain()
                told = {result.request for result in bench.results}
                bench.submit(*(due for dues in given.values() for due in dues if due not in told))

    worker = TimedWorker(random.choice([0.005, 0.1, 0.4]))
    bench = run_scenario(scenario, worker=worker, catch_up="all", max_batch_size=random.choice([2, 1000]))
    published = defaultdict(list)
    for result in bench.results:
        published[result.request.series].append(result.request)
    assert published == given


def test_what_is_behind_a_bar_taken_back_is_taken_back_even_from_a_batch() -> None:
    one, other, absent = series(3)
    first, last = due_at(one, START + 1000), due_at(one, START + 3000)

    async def scenario(bench: SchedulerHarness) -> None:
        bench.submit(due_at(other, START + 3000))
        await asyncio.sleep(0.01)  # that close is complete now, and the next one is not
        bench.expected[START + 1000] = {absent}
        bench.submit(first, last)
        await asyncio.sleep(0.2)
        assert bench.worker.sizes() == [1, 1]
        bench.scheduler.cancel_waiting()
        await bench.scheduler.drain()
        assert [result.request.series for result in bench.results] == [other]
        bench.submit(first, last)

    bench = run_scenario(scenario, worker=TimedWorker(0.15), catch_up="all")
    assert [result.request for result in bench.results[1:]] == [first, last]
