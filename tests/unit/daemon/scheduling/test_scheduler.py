"""Draining, cancelling and stopping the scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import pytest

from kronos_stream.daemon.requests import ForecastResult
from kronos_stream.market.clock import ManualClock
from tests.support.scheduler import (
    START,
    SchedulerHarness,
    TimedWorker,
    make_series,
    request_at,
    run_scenario,
)


@pytest.mark.virtual_time
async def test_drain_does_not_wait_for_expected_bars() -> None:
    """In a replay time does not advance before everything is done, so no bar can arrive."""
    present, missing = make_series(2)

    harness = SchedulerHarness(clock=ManualClock(START))
    running = asyncio.create_task(harness.scheduler.run())
    harness.expected[START] = {missing}
    harness.submit(request_at(present, START))
    async with asyncio.timeout(5):
        await harness.scheduler.drain()
    running.cancel()
    assert harness.outcomes() == [("S0/X", 0, "forecast")]


@pytest.mark.virtual_time
async def test_failing_publisher_ends_the_run() -> None:
    harness = SchedulerHarness()

    async def fail(_: Sequence[ForecastResult]) -> Sequence[ForecastResult]:
        raise OSError("disk full")

    harness.scheduler._publish = fail
    harness.submit(request_at(make_series(1)[0], START))
    with pytest.raises(ExceptionGroup, match="unhandled") as caught:
        await harness.scheduler.run()
    assert caught.group_contains(OSError, match="disk full")


@pytest.mark.virtual_time
async def test_finish_completes_the_current_batch_only() -> None:
    busy, waiting = make_series(2)

    harness = SchedulerHarness(TimedWorker(2.0))
    running = asyncio.create_task(harness.scheduler.run())
    harness.submit(request_at(busy, START))
    await asyncio.sleep(0.5)
    harness.submit(request_at(waiting, START), request_at(busy, START + 1000))
    assert await harness.scheduler.finish(5)
    harness.submit(request_at(waiting, START + 1000))
    await running
    assert harness.outcomes() == [("S0/X", 0, "forecast")]


@pytest.mark.virtual_time
async def test_finish_is_bounded() -> None:
    harness = SchedulerHarness(TimedWorker(100.0))
    running = asyncio.create_task(harness.scheduler.run())
    harness.submit(request_at(make_series(1)[0], START))
    await asyncio.sleep(1)
    assert not await harness.scheduler.finish(5)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    assert harness.results == []
    assert asyncio.get_running_loop().time() == pytest.approx(6)


def test_cancelling_a_bar_cancels_later_bars_even_in_a_batch() -> None:
    one, other, missing = make_series(3)
    first, last = request_at(one, START + 1000), request_at(one, START + 3000)

    async def scenario(harness: SchedulerHarness) -> None:
        harness.submit(request_at(other, START + 3000))
        await asyncio.sleep(0.01)  # this close is now complete, unlike the next one
        harness.expected[START + 1000] = {missing}
        harness.submit(first, last)
        await asyncio.sleep(0.2)
        assert harness.worker.batch_sizes() == [1, 1]
        harness.scheduler.cancel_waiting()
        await harness.scheduler.drain()
        assert [result.request.series for result in harness.results] == [other]
        harness.submit(first, last)

    harness = run_scenario(scenario, worker=TimedWorker(0.15), catch_up="all")
    assert [result.request for result in harness.results[1:]] == [first, last]
