"""Outcomes of requests: forecast, skipped or failed, and why."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from kronos_stream.bars.window import Window
from kronos_stream.daemon.requests import ForecastRequest, ForecastResult
from kronos_stream.daemon.scheduling.scheduler import CatchUp
from tests.support.scheduler import (
    START,
    SchedulerHarness,
    TimedWorker,
    make_series,
    request_at,
    run_scenario,
    window_of,
)


def test_catch_up_newest_skips_overtaken_bars_and_all_forecasts_them() -> None:
    (one,) = make_series(1)

    async def scenario(harness: SchedulerHarness) -> None:
        for second in range(5):
            harness.submit(request_at(one, START + 1000 * second))
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


def test_outdated_newest_bar_is_stale() -> None:
    """Its forecast would have expired before the bar arrived; "all" forecasts it anyway."""
    (one,) = make_series(1)

    async def scenario(harness: SchedulerHarness) -> None:
        await asyncio.sleep(10)
        harness.submit(request_at(one, START + 7_000), request_at(one, START + 8_000))

    assert run_scenario(scenario).outcomes() == [("S0/X", 7, "overrun"), ("S0/X", 8, "stale")]
    everything = run_scenario(scenario, catch_up="all")
    assert everything.outcomes() == [("S0/X", 7, "forecast"), ("S0/X", 8, "forecast")]


@pytest.mark.parametrize("catch_up", ["newest", "all"])
def test_revision_replaces_a_waiting_bar_and_repeats_a_forecast_one(catch_up: CatchUp) -> None:
    one, other = make_series(2, "1m")

    async def scenario(harness: SchedulerHarness) -> None:
        harness.expected[START] = {other}
        harness.submit(
            request_at(one, START), request_at(one, START, revision=1), request_at(other, START)
        )
        await asyncio.sleep(0.5)
        harness.submit(request_at(one, START, revision=2))
        await asyncio.sleep(0.5)
        harness.submit(request_at(one, START, revision=3))

    results = run_scenario(scenario, worker=TimedWorker(0.4), catch_up=catch_up).results
    outcomes = [(r.request.revision, r.reason) for r in results if r.request.series == one]
    assert outcomes == [(0, "revised"), (1, ""), (2, ""), (3, "")]


def test_skipped_bars_keep_their_order() -> None:
    """They are published at once, or after earlier bars of the series that are in a batch."""
    busy, idle = make_series(2)

    async def scenario(harness: SchedulerHarness) -> None:
        harness.submit(request_at(busy, START))
        await asyncio.sleep(0.1)
        harness.submit(request_at(busy, START + 1000, skip_reason="gap"))
        harness.submit(request_at(idle, START + 1000, skip_reason="warming up"))
        await asyncio.sleep(0.1)
        assert harness.outcomes() == [("S1/X", 1, "warming up")]

    harness = run_scenario(scenario, worker=TimedWorker(1.0))
    assert harness.outcomes()[1:] == [("S0/X", 0, "forecast"), ("S0/X", 1, "gap")]


def test_failed_forecast_does_not_affect_others() -> None:
    without_window, failing, good = make_series(3)

    async def get_window(request: ForecastRequest) -> Window | None:
        return None if request.series == without_window else window_of(request)

    async def scenario(harness: SchedulerHarness) -> None:
        harness.submit(*(request_at(one, START) for one in (without_window, failing, good)))

    harness = run_scenario(
        scenario,
        worker=TimedWorker(fails=lambda window: window.series == failing),
        get_window=get_window,
    )
    assert sorted(harness.outcomes()) == [
        ("S0/X", 0, "gap"),
        ("S1/X", 0, "failed"),
        ("S2/X", 0, "forecast"),
    ]
    assert harness.metrics.outcomes.labels("skipped", "failed")._value.get() == 1


def test_metrics_count_published_outcomes() -> None:
    followed, removed = make_series(2)

    async def scenario(harness: SchedulerHarness) -> None:
        async def publish(results: Sequence[ForecastResult]) -> Sequence[ForecastResult]:
            return [
                ForecastResult(result.request, reason="removed")
                if result.request.series == removed
                else result
                for result in results
            ]

        harness.scheduler._publish = publish
        harness.submit(*(request_at(one, START) for one in (followed, removed)))

    outcomes = run_scenario(scenario).metrics.outcomes
    assert outcomes.labels("forecast", "")._value.get() == 1
    assert outcomes.labels("skipped", "removed")._value.get() == 1


def test_backlog_is_bounded() -> None:
    (one,) = make_series(1)

    async def scenario(harness: SchedulerHarness) -> None:
        harness.submit(*(request_at(one, START + 1000 * i) for i in range(50)))

    outcomes = run_scenario(scenario, catch_up="all", max_backlog=20).outcomes()
    assert [outcome for _, _, outcome in outcomes] == ["overrun"] * 30 + ["forecast"] * 20
