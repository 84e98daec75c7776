"""Intake pipeline after a restart: saved bars, missing history, repeated requests."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from kronos_stream.daemon.storage.state import State
from kronos_stream.market.candle import Bar, Update
from tests.support.pipeline import (
    LOOKBACK,
    START,
    make_venue,
    origins,
    record_outcomes,
    running_pipeline,
)

pytestmark = pytest.mark.virtual_time


async def test_restart_requests_only_missing_history(tmp_path: Path) -> None:
    venue = make_venue("1m")
    (one,) = venue.series
    async with running_pipeline(tmp_path, venue) as harness:
        await harness.wait_for_bars(3.1)
        await record_outcomes(harness)
    venue.history_requests.clear()
    await venue.clock.sleep(5 * 60)
    async with running_pipeline(tmp_path, venue) as harness:
        await harness.clock.sleep(1)
        minute = 60_000
        assert venue.history_requests == [(one, START + 3 * minute, START + 8 * minute)]
        assert origins(harness.requests) == [START + i * minute for i in range(3, 8)]
        await harness.wait_for_bars(9.1)
        assert len(harness.requests) == 6
        assert all(request.skip_reason is None for request in harness.requests)
        window = await harness.saved_bars.window(harness.requests[0])
        assert window is not None
        assert len(window.times) == LOOKBACK


@pytest.mark.parametrize("catch_up", ["newest", "all"])
async def test_long_absence_is_caught_up_or_skipped(
    tmp_path: Path, catch_up: Literal["newest", "all"]
) -> None:
    venue = make_venue()
    (one,) = venue.series
    async with running_pipeline(tmp_path, venue) as harness:
        await harness.wait_for_bars(3.1)
        await record_outcomes(harness)
    await venue.clock.sleep(86_400)
    async with running_pipeline(tmp_path, venue, catch_up=catch_up) as harness:
        started = harness.clock.now()
        await harness.clock.sleep(60)
        bars = (harness.clock.now() - START) // 10_000
        if catch_up == "all":
            assert origins(harness.requests) == [START + i * 10_000 for i in range(3, bars)]
        else:
            # Bars that are older than a context are not fetched.
            assert all(request.close > started for request in harness.requests)
            assert 5 <= len(harness.requests) <= 6
        window = await harness.saved_bars.window(harness.requests[-1])
        assert window is not None
        assert len(window.times) == LOOKBACK
        assert (np.diff(window.times) == 10_000).all()
        assert window.values[0, 4] == harness.venue.bar(one, int(window.times[0])).volume  # type: ignore[union-attr]


async def test_restart_submits_saved_bars_without_outcome(tmp_path: Path) -> None:
    venue = make_venue()
    async with running_pipeline(tmp_path, venue) as harness:
        await harness.wait_for_bars(200.1)
        first = harness.requests[:20]
        harness.requests[:] = first
        await record_outcomes(harness)
    async with running_pipeline(tmp_path, venue) as harness:
        # More than a context holds.
        assert origins(harness.requests) == [START + i * 10_000 for i in range(20, 200)]
        window = await harness.saved_bars.window(harness.requests[0])
        assert window is not None
        assert window.last.time == harness.requests[0].origin
        assert len(window.times) == LOOKBACK


async def test_revision_of_the_newest_bar_is_submitted_again_after_a_crash(tmp_path: Path) -> None:
    venue = make_venue("1m")
    (one,) = venue.series
    async with running_pipeline(tmp_path, venue) as harness:
        await harness.wait_for_bars(2.01)
        await record_outcomes(harness)
        harness.requests.clear()
        changed = venue.revise(one, START + 60_000, harness.clock.now())
        callbacks = harness.pipeline.callbacks("binance")
        callbacks.update(Update(one, changed, True, harness.clock.now()))  # noqa: FBT003
        await harness.clock.sleep(1)
        assert [(request.origin, request.revision) for request in harness.requests] == [
            (START + 60_000, 1)
        ]
        window = await harness.saved_bars.window(harness.requests[0])
        assert window is not None
        assert (window.revision, window.last) == (1, changed)
    async with running_pipeline(tmp_path, venue) as harness:
        assert [(request.origin, request.revision) for request in harness.requests] == [
            (START + 60_000, 1)
        ]
        await record_outcomes(harness)
    async with running_pipeline(tmp_path, venue) as harness:
        assert harness.requests == []


async def test_longer_lookback_after_a_restart_is_filled_from_history(tmp_path: Path) -> None:
    venue = make_venue()
    (one,) = venue.series
    state = await State.open(tmp_path / "state.sqlite")
    saved = [START - i * 10_000 for i in range(12, 2, -1)]
    candles = [venue.bar(one, time) for time in saved]
    await state.save_bars([(one, Bar(c, received=1)) for c in candles if c is not None])
    await state.init_watermark(one, saved[-3])
    await state.close()
    async with running_pipeline(tmp_path, venue) as harness:
        await harness.wait_for_bars(2.5)
        assert origins(harness.requests) == [START + i * 10_000 for i in range(-4, 2)]
        assert all(request.skip_reason is None for request in harness.requests)
        window = await harness.saved_bars.window(harness.requests[0])
        assert window is not None
        assert len(window.times) == LOOKBACK
