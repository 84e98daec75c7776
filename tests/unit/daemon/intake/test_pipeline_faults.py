"""Intake pipeline with random venue faults and crashes: every bar is saved and requested once."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from kronos_stream.daemon.requests import Outcome
from tests.support.pipeline import (
    START,
    VenueFaults,
    assert_state_matches_venue,
    make_venue,
    running_pipeline,
)

pytestmark = pytest.mark.virtual_time


def random_faults(random: Random) -> VenueFaults:
    """Random combination of faults, from few to many."""
    level = random.choice((0.02, 0.1, 0.4))

    def share() -> float:
        return random.choice((0, 0, 1)) * random.random() * level

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
        lag_seconds=random.choice((0, 0, 0.5, 2)),
        push_outage=random.choice(((0, 0), (10, 14), (20, 60))),
        rest_outage=random.choice(((0, 0), (10, 12), (-90, 3))),
    )


@pytest.mark.parametrize("seed", range(20))
async def test_saved_bars_equal_the_venue_despite_faults(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    faults = random_faults(random)
    timeframe = random.choice(("5s", "10s", "1m"))
    venue = make_venue(timeframe, symbols=2, seed=seed, faults=faults)
    async with running_pipeline(tmp_path, venue, seed=seed) as harness:
        step = harness.venue.series[0].timeframe.milliseconds or 0
        await harness.wait_for_bars(100)
        harness.venue.faults = VenueFaults(empty_bars=faults.empty_bars)
        # After two audits, changes that were not pushed are known, too.
        await harness.clock.sleep(45 * 60)
        await harness.pipeline.drain()
        end = harness.clock.now() - 15_000 - 2 * step
        await assert_state_matches_venue(harness, until=end)


@pytest.mark.parametrize("seed", range(8))
async def test_crashes_lose_no_bar_and_repeat_no_decided_one(tmp_path: Path, seed: int) -> None:
    """Outcomes are recorded for some requests; the others are submitted again after the crash."""
    random = Random(seed)
    faults = random_faults(random)
    step = 10_000
    venue = make_venue(seed=seed, faults=faults)
    (one,) = venue.series
    decided: list[tuple[int, int]] = []
    for life in range(8):
        async with running_pipeline(tmp_path, venue, seed=seed + life) as harness:
            await harness.clock.sleep(random.choice((0, 0.01, 3, 30, 200, 700)))
            bar_ids = [(request.origin, request.revision) for request in harness.requests]
            assert bar_ids == sorted(set(bar_ids))
            # Only a revision follows a bar that has an outcome.
            assert not set(bar_ids) & set(decided)
            done = harness.requests[: random.randrange(len(harness.requests) + 1)]
            decided += [(request.origin, request.revision) for request in done]
            outcomes = [
                Outcome(request.series.name, request.origin, request.revision, "forecast")
                for request in done
            ]
            await harness.state.record(outcomes, [])
        await venue.clock.sleep(random.choice((0, 5, 100)))
    venue.faults = VenueFaults(empty_bars=faults.empty_bars)
    async with running_pipeline(tmp_path, venue, seed=seed) as harness:
        await harness.clock.sleep(40 * 60)
        decided += [(request.origin, request.revision) for request in harness.requests]
        bars = await harness.state.load(one, 10_000)
        times = [bar.candle.time for bar in bars if bar.candle.time >= START]
        assert times == list(range(START, times[-1] + 1, step))
        assert times[-1] >= harness.clock.now() - 2 * step - 15_000
        assert sorted({origin for origin, _ in decided}) == times
        for bar in bars:
            true = venue.bar(one, bar.candle.time)
            assert bar.synthetic if true is None else bar.candle == true
