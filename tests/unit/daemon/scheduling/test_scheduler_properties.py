"""Random arrivals, revisions, cancellations and speeds: one true outcome per bar, in order."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from random import Random

import pytest

from kronos_stream.daemon.requests import ForecastRequest, ForecastResult
from kronos_stream.daemon.scheduling.scheduler import CatchUp
from kronos_stream.market.series import Series
from tests.support.scheduler import (
    START,
    SchedulerHarness,
    TimedWorker,
    make_series,
    request_at,
    run_scenario,
)


def is_busy(worker: TimedWorker, moment: float) -> bool:
    """Return whether a batch was running just before ``moment``, in seconds of the loop."""
    return any(
        at < moment <= at + worker.seconds_per_series * len(windows) + 0.01
        for at, windows, _ in worker.batches
    )


class RandomFeed:
    """Scenario with bars of random series that are late, revised or not to be forecast."""

    def __init__(self, random: Random) -> None:
        timeframes = random.choices(["1s", "2s", "10s"], k=random.randint(1, 30))
        self.series = [Series.parse(f"test:S{i}/X:{tf}") for i, tf in enumerate(timeframes)]
        self.submitted: dict[Series, list[ForecastRequest]] = defaultdict(list)
        self.submit_times: dict[ForecastRequest, float] = {}
        self._random = random
        self._lateness = random.choice([0.02, 0.3, 1.2])

    async def __call__(self, harness: SchedulerHarness) -> None:
        for second in range(1, 21):
            harness.expected[START + 1000 * second] = {
                one for one in self.series if 1000 * second % one.timeframe.after(0) == 0
            }
        async with asyncio.TaskGroup() as tasks:
            for one in self.series:
                tasks.create_task(self._send_bars(harness, one))

    async def _send_bars(self, harness: SchedulerHarness, series: Series) -> None:
        random, close = self._random, START
        while close < START + 20_000:
            close = series.timeframe.after(close)
            late = int(1000 * self._lateness * random.random())
            if random.random() < 0.05:
                late += random.randint(500, 4000)
            await harness.clock.sleep_until(close + late)
            skip_reason = "gap" if random.random() < 0.05 else None
            for revision in range(1 + (random.random() < 0.1)):
                late = harness.clock.now() - close
                request = request_at(series, close, late, revision, skip_reason)
                self.submitted[series].append(request)
                self.submit_times[request] = asyncio.get_running_loop().time()
                harness.submit(request)
                await asyncio.sleep(random.choice([0, 0, 0.05, 0.6]))

    def later_requests(self, request: ForecastRequest) -> list[ForecastRequest]:
        """Later requests of the same series, including revisions of the same bar."""
        of_series = self.submitted[request.series]
        return of_series[of_series.index(request) + 1 :]


@pytest.mark.parametrize("catch_up", ["newest", "all"])
@pytest.mark.parametrize("seed", range(12))
def test_every_bar_has_one_true_outcome_in_order(seed: int, catch_up: CatchUp) -> None:
    random = Random(seed)
    feed = RandomFeed(random)
    worker = TimedWorker(random.choice([0.001, 0.02, 0.2, 1.5]), lambda _: random.random() < 0.02)
    harness = run_scenario(
        feed, worker=worker, publish_seconds=random.choice([0.0, 0.01, 0.5]), catch_up=catch_up
    )
    assert harness.published() == feed.submitted
    batched = {
        (window.series, int(window.times[-1]), window.revision): at
        for at, windows, _ in worker.batches
        for window in windows
    }
    assert len(batched) == sum(worker.batch_sizes())
    for _, windows, deadline in worker.batches:
        assert len(windows) * worker.seconds_per_series <= deadline / 2
    for result in harness.results:
        at = batched.get((result.request.series, result.request.origin, result.request.revision))
        assert (at is not None) == (result.reason in ("", "failed"))
        check_outcome(result, at, feed, harness, catch_up)


def check_outcome(
    result: ForecastResult,
    at: float | None,
    feed: RandomFeed,
    harness: SchedulerHarness,
    catch_up: CatchUp,
) -> None:
    """Assert that the reason of a result is true.

    at: time of the loop when its batch was formed, None if it was in no batch.
    """
    request, later = result.request, feed.later_requests(result.request)
    expiry = (request.series.timeframe.after(request.close) - START) / 1000
    match result.reason:
        case "gap":
            assert request.skip_reason == "gap"
        case "revised":
            assert later[0].origin == request.origin
        case "overrun":
            assert catch_up == "newest"
            assert later or is_busy(harness.worker, expiry)
        case "stale":
            assert catch_up == "newest"
            assert feed.submit_times[request] >= expiry
        case _:
            assert at is not None
            if catch_up == "newest":
                assert at < expiry
                assert not any(feed.submit_times[other] < at - 1e-6 for other in later)


@pytest.mark.parametrize("seed", range(20))
def test_cancelled_and_resubmitted_bars_keep_their_order(seed: int) -> None:
    """After a rebalance of a consumer group no bar is published twice or out of order."""
    random = Random(seed)
    *all_series, missing = make_series(6)
    submitted: dict[Series, list[ForecastRequest]] = defaultdict(list)

    async def scenario(harness: SchedulerHarness) -> None:
        for second in range(1, 161):
            harness.expected[START + 1000 * second] = {missing} if random.random() < 0.5 else set()
        for second in range(1, 41):
            for one in random.sample(all_series, random.randint(0, 5)):
                # Early and late bars make closes complete in another order.
                for _ in range(random.randint(1, 3)):
                    before = submitted[one][-1].close if submitted[one] else START
                    submitted[one].append(request_at(one, before + 1000))
                    harness.submit(submitted[one][-1])
            await asyncio.sleep(random.choice([0, 0.05, 0.3, 1.0]))
            if second % 4 == 0:
                harness.scheduler.cancel_waiting()
                await harness.scheduler.drain()
                published = {result.request for result in harness.results}
                for requests in submitted.values():
                    harness.submit(*(one for one in requests if one not in published))

    worker = TimedWorker(random.choice([0.005, 0.1, 0.4]))
    harness = run_scenario(
        scenario, worker=worker, catch_up="all", max_batch_size=random.choice([2, 1000])
    )
    assert harness.published() == submitted
