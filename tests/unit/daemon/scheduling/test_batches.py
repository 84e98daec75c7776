"""Formation of batches: waiting for a close, deadlines, sizes and fairness."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import numpy as np
import pytest

from tests.support.scheduler import (
    START,
    SchedulerHarness,
    TimedWorker,
    make_series,
    request_at,
    run_scenario,
)


def test_batch_starts_with_the_last_expected_bar() -> None:
    all_series = make_series(3)

    async def scenario(harness: SchedulerHarness) -> None:
        harness.expected[START] = set(all_series)
        for one in all_series:
            await asyncio.sleep(0.03)
            harness.submit(request_at(one, START))
        await asyncio.sleep(1)

    ((at, windows, _),) = run_scenario(scenario).worker.batches
    assert len(windows) == 3
    assert at == pytest.approx(0.09)


def test_late_bar_is_waited_for_briefly_and_joins_the_next_batch() -> None:
    first, second, late = make_series(3)

    async def scenario(harness: SchedulerHarness) -> None:
        harness.expected[START] = {first, second, late}
        harness.submit(request_at(first, START))
        await asyncio.sleep(0.2)
        harness.submit(request_at(second, START))
        await asyncio.sleep(0.4)
        harness.submit(request_at(late, START))

    batches = run_scenario(scenario).worker.batches
    assert [(round(at, 3), len(windows)) for at, windows, _ in batches] == [(0.25, 2), (0.6, 1)]


def test_late_venue_still_makes_one_batch() -> None:
    """The waiting time counts from the arrival of the first bar, not from the close."""
    all_series = make_series(20)

    async def scenario(harness: SchedulerHarness) -> None:
        harness.expected[START] = set(all_series)
        await asyncio.sleep(0.9)
        for one in all_series:
            harness.submit(request_at(one, START, late=900))
            await asyncio.sleep(0.001)

    assert run_scenario(scenario).worker.batch_sizes() == [20]


def test_timeframes_that_close_together_share_a_batch() -> None:
    short, long = make_series(4, "1s"), make_series(3, "1m")

    async def scenario(harness: SchedulerHarness) -> None:
        harness.expected[START] = {*short, *long}
        harness.submit(*(request_at(one, START) for one in (*short, *long)))

    harness = run_scenario(scenario)
    assert harness.worker.batch_sizes() == [7]
    assert harness.worker.batches[0][2] == 2  # the shorter deadline


@pytest.mark.parametrize(
    ("timeframe", "deadline"), [("1s", 2), ("5s", 4), ("1m", 48), ("1h", 60), ("1M", 60)]
)
def test_deadline_follows_from_the_timeframe(timeframe: str, deadline: float) -> None:
    async def scenario(harness: SchedulerHarness) -> None:
        harness.submit(request_at(make_series(1, timeframe)[0], START))

    assert run_scenario(scenario).worker.batches[0][2] == deadline


def test_deadline_is_extended_for_a_slow_model() -> None:
    async def scenario(harness: SchedulerHarness) -> None:
        harness.submit(*(request_at(one, START) for one in make_series(2, "1s")))

    harness = run_scenario(scenario, worker=TimedWorker(3.0), catch_up="all")
    assert [deadline for _, _, deadline in harness.worker.batches] == [6, 6]
    assert harness.worker.batch_sizes() == [1, 1]


def test_catch_up_all_puts_several_bars_of_a_series_into_a_batch() -> None:
    async def scenario(harness: SchedulerHarness) -> None:
        for close in range(3):
            harness.submit(*(request_at(one, START + 1000 * close) for one in make_series(2)))

    # Five forecasts fit into half the deadline.
    harness = run_scenario(scenario, catch_up="all", worker=TimedWorker(0.2))
    ((_, first, _), (_, second, _)) = harness.worker.batches
    assert [w.series.symbol for w in first] == ["S0/X", "S1/X", "S0/X", "S1/X", "S0/X"]
    assert [w.series.symbol for w in second] == ["S1/X"]


def test_results_contain_queue_and_compute_time() -> None:
    first, second = make_series(2)

    async def scenario(harness: SchedulerHarness) -> None:
        harness.expected[START] = {second}
        await asyncio.sleep(0.1)
        harness.submit(request_at(first, START, late=100))
        await asyncio.sleep(0.05)
        harness.submit(request_at(second, START, late=150))

    results = run_scenario(scenario, worker=TimedWorker(0.2)).results
    assert [(r.queued_ms, r.compute_ms) for r in results] == [(50, 400), (0, 400)]


def test_other_tasks_run_while_windows_are_built() -> None:
    turns = 0

    async def scenario(harness: SchedulerHarness) -> None:
        nonlocal turns
        harness.submit(*(request_at(one, START) for one in make_series(1000, "1m")))
        while not harness.worker.batches:
            turns += 1
            await asyncio.sleep(0)

    run_scenario(scenario)
    assert turns > 25


def test_overload_is_shared_by_all_series() -> None:
    """With 100 series and 20 forecasts a second, each series is forecast every few seconds."""
    all_series = make_series(100)

    async def scenario(harness: SchedulerHarness) -> None:
        for second in range(60):
            harness.submit(*(request_at(one, START + 1000 * second) for one in all_series))
            await asyncio.sleep(1)

    harness = run_scenario(scenario, worker=TimedWorker(0.05))
    batch_times = defaultdict(list)
    for at, windows, _ in harness.worker.batches:
        for window in windows:
            batch_times[window.series].append(at)
    assert len(batch_times) == 100
    for times in batch_times.values():
        assert max(np.diff([0, *times, 60])) < 8
    assert len(harness.results) == 6000
    forecast = sum(not result.reason for result in harness.results)
    assert forecast > 60 * 20 * 0.8
    assert {result.reason for result in harness.results} == {"", "overrun"}
