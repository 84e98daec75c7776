"""Intake pipeline: closed bars are saved and requested once, in order, and not early."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Literal

import pytest

from kronos_stream.daemon.storage.database import StateError
from kronos_stream.market.candle import Update
from kronos_stream.market.series import Series
from tests.support.pipeline import (
    LOOKBACK,
    START,
    VenueFaults,
    assert_state_matches_venue,
    make_venue,
    origins,
    record_outcomes,
    running_pipeline,
)

pytestmark = pytest.mark.virtual_time


async def test_each_bar_is_requested_once_right_after_its_close(tmp_path: Path) -> None:
    async with running_pipeline(tmp_path, make_venue(symbols=3)) as harness:
        await harness.wait_for_bars(20.1)
        step = 10_000
        for one in harness.venue.series:
            requests = [request for request in harness.requests if request.series == one]
            assert origins(requests) == [START + step * i for i in range(20)]
            assert all(request.skip_reason is None for request in requests)
        window = await harness.saved_bars.window(harness.requests[-1])
        assert window is not None
        assert window.values.shape == (LOOKBACK, 6)
        assert window.reasons == ()
        # One history request per series at the start, and none since.
        assert len(harness.venue.history_requests) == 3


@pytest.mark.parametrize("degraded", ["forecast", "skip"])
async def test_gap_that_cannot_be_filled_is_bridged_by_placeholders(
    tmp_path: Path, degraded: Literal["forecast", "skip"]
) -> None:
    faults = VenueFaults(push_outage=(10, 12), rest_outage=(10, 60))
    async with running_pipeline(tmp_path, make_venue(faults=faults), degraded=degraded) as harness:
        await harness.wait_for_bars(15.5)
        assert len(harness.requests) == 10  # later bars are held back
        assert harness.saved_bars.outstanding_bars(START + 160_000) == 0
        await harness.wait_for_bars(40.5)
        assert origins(harness.requests) == [START + i * 10_000 for i in range(40)]
        last = harness.requests[-1]
        window = await harness.saved_bars.window(last)
        assert window is not None
        assert window.reasons == ("2 missing bars",)
        assert last.skip_reason == ("gap" if degraded == "skip" else None)
        assert harness.saved_bars.outstanding_bars(START + 410_000) == 1
        # History requests succeed again: the gap is filled, and windows have no placeholders.
        await harness.wait_for_bars(70.5)
        window = await harness.saved_bars.window(harness.requests[-1])
        assert window is not None
        assert window.reasons == ()
        assert harness.requests[-1].skip_reason is None
        await assert_state_matches_venue(harness, until=START + 69 * 10_000)


async def test_silent_series_is_not_waited_for(tmp_path: Path) -> None:
    venue = make_venue("1m", symbols=3)
    silent = venue.series[1]
    async with running_pipeline(tmp_path, venue) as harness:
        await harness.wait_for_bars(3.5)
        venue.suspensions[silent] = START + 4 * 60_000, START + 9 * 60_000
        assert harness.saved_bars.outstanding_bars(START + 5 * 60_000) == 0
        await harness.wait_for_bars(4.5)
        assert harness.saved_bars.outstanding_bars(START + 5 * 60_000) == 3
        await harness.wait_for_bars(5.5)
        # The grace of its bar is over; batches do not wait for it.
        assert harness.saved_bars.outstanding_bars(START + 5 * 60_000) == 0
        assert b'silent_series{venue="binance"} 1.0' in harness.metrics.render()
        assert harness.saved_bars.outstanding_bars(START + 6 * 60_000) == 2
        others = [request for request in harness.requests if request.series != silent]
        assert len(others) == 10
        await harness.wait_for_bars(12.5)
        assert b'silent_series{venue="binance"} 0.0' in harness.metrics.render()
        # Bars that the venue does not have become flat bars, and requests like any other.
        requests = [request for request in harness.requests if request.series == silent]
        assert origins(requests) == [START + i * 60_000 for i in range(12)]
        window = await harness.saved_bars.window(requests[-1])
        assert window is not None
        assert window.synthetic == 5
        await assert_state_matches_venue(harness, until=START + 11 * 60_000)


async def test_new_listing_is_forecast_before_its_lookback_is_full(
    tmp_path: Path,
) -> None:
    venue = make_venue()
    venue.first = START - 28 * 10_000
    async with running_pipeline(tmp_path, venue) as harness:
        await harness.wait_for_bars(10.5)
        skip_reasons = [request.skip_reason for request in harness.requests]
        assert skip_reasons == ["warming up"] * 3 + [None] * 7
        window = await harness.saved_bars.window(harness.requests[-1])
        assert window is not None
        assert len(window.times) == 38
        await record_outcomes(harness)
    async with running_pipeline(tmp_path, venue) as harness:
        # After a restart, too, once the venue has no older bars.
        await harness.wait_for_bars(12.5)
        assert [request.skip_reason for request in harness.requests] == [None, None]


async def test_change_of_series_loses_no_bar_of_the_others(tmp_path: Path) -> None:
    venue = make_venue(symbols=3)
    first, second, third = venue.series
    async with running_pipeline(tmp_path, venue, series=[first, second]) as harness:
        await harness.wait_for_bars(5.5)
        await harness.pipeline.follow([second, third])
        await harness.wait_for_bars(10.5)
        await harness.pipeline.follow([first, second, third])
        await harness.wait_for_bars(15.5)
        came: dict[Series, list[int]] = {one: [] for one in venue.series}
        for request in harness.requests:
            came[request.series].append((request.origin - START) // 10_000)
        assert came[first] == list(range(15))
        assert came[second] == list(range(15))
        assert came[third] == list(range(5, 15))
        assert harness.saved_bars.outstanding_bars(START + 160_000) == 3


async def test_drain_returns_once_bars_are_saved_and_submitted(tmp_path: Path) -> None:
    venue = make_venue()
    (one,) = venue.series
    venue.pushes = False
    async with running_pipeline(tmp_path, venue) as harness:
        await harness.wait_for_bars(1)
        final = venue.bar(one, START)
        assert final is not None
        harness.pipeline.callbacks("binance").update(Update(one, final, True, harness.clock.now()))  # noqa: FBT003
        assert harness.requests == []
        await harness.pipeline.drain()
        assert origins(harness.requests) == [START]
        assert (await harness.state.load(one, 1))[0].candle == final


async def test_invalid_frames_and_candles_become_dead_letters(tmp_path: Path) -> None:
    venue = make_venue(faults=VenueFaults(invalid=1))
    async with running_pipeline(tmp_path, venue) as harness:
        harness.pipeline.callbacks("binance").reject(None, "not JSON", b"{")
        await harness.wait_for_bars(5.5)
        assert harness.dead_letters[0] == "not JSON"
        assert len(harness.dead_letters) == 1 + 6  # once per bar
        assert "reported closed" in harness.dead_letters[1]
        assert origins(harness.requests) == [START + i * 10_000 for i in range(5)]


async def test_disk_that_cannot_keep_up_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kronos_stream.daemon.intake.save_queue._HARD_LIMIT", 50)

    async def never_save(*_: object) -> None:
        await asyncio.sleep(10_000)

    async def run() -> None:
        async with running_pipeline(tmp_path, make_venue()) as harness:
            monkeypatch.setattr(harness.state, "save_bars", never_save)
            await harness.clock.sleep(10_000)

    with pytest.raises(ExceptionGroup) as caught:
        await run()
    assert caught.group_contains(StateError, match="faster disk")
