"""Sequencer: start of a series, restart, and long timeframes."""

from __future__ import annotations

from random import Random

from kronos_stream.bars.effects import (
    Append,
    Begin,
    Fetch,
    Reject,
)
from kronos_stream.bars.sequencer import BarSequencer
from kronos_stream.market.candle import Bar
from kronos_stream.market.timeframe import Timeframe
from tests.support.sequencer import (
    HISTORY,
    MINUTE,
    START,
    appended,
    candle,
    make_harness,
)


def test_history_is_requested_and_appended_first() -> None:
    harness = make_harness(bars=())
    begin, fetch = harness.tick(30)
    assert begin == Begin(START + 30_000 - MINUTE)
    assert fetch == Fetch(START + 30_000 - HISTORY * MINUTE, START + 30_000)
    assert isinstance(fetch, Fetch)
    assert harness.push(candle(0), 60) == []  # held until the history has come
    effects = harness.answer(fetch, 61, *(candle(i) for i in range(-40, 0)))
    assert appended(effects) == [candle(i) for i in range(-40, 1)]


def test_series_without_history_starts_with_the_first_push() -> None:
    harness = make_harness(bars=())
    fetch = harness.tick(30)[-1]
    assert isinstance(fetch, Fetch)
    assert harness.answer(fetch, 31) == []
    harness.push(candle(0), 40, closed=False)
    assert appended(harness.push(candle(0), 60)) == [candle(0)]


def test_too_few_saved_bars_are_joined_with_the_history() -> None:
    bars = [Bar(candle(i), revision=2, received=1) for i in range(-5, -2)]
    harness = make_harness(bars=bars, complete=False)
    fetch = harness.tick(10)[-1]
    assert isinstance(fetch, Fetch)
    effects = harness.answer(fetch, 11, *(candle(i) for i in range(-20, 0)))
    kept = {effect.bar.candle.time: effect.bar for effect in effects if isinstance(effect, Append)}
    assert list(kept) == [START + i * MINUTE for i in range(-20, 0)]
    assert [kept[START + i * MINUTE].revision for i in range(-6, -1)] == [0, 2, 2, 2, 0]


def test_restart_requests_exactly_the_missing_bars() -> None:
    sequencer = make_harness().sequencer
    assert sequencer.tick(START + 10 * MINUTE + 5_000) == [
        Fetch(START, START + 10 * MINUTE),
    ]


def test_weekly_bars_follow_the_venue() -> None:
    week = 7 * 86_400_000
    monday = 1_718_582_400_000  # 2024-06-17
    sequencer = BarSequencer(
        Timeframe.parse("1w"),
        Random(0),
        grace_seconds=2,
        history_lag_seconds=None,
        fills_empty=True,
        history_bars=10,
    )
    now = monday + 5_000
    fetch = sequencer.tick(now)[-1]
    assert isinstance(fetch, Fetch)
    history = [candle(0)._replace(time=monday - i * week) for i in (3, 2, 1)]
    assert appended(sequencer.fetch_completed(fetch, history, now)) == history
    (effect,) = sequencer.update(candle(0)._replace(time=monday - week + 86_400_000), True, now)  # noqa: FBT003
    assert isinstance(effect, Reject)
    assert sequencer.next == monday
