"""Sequencer: closing, order and validation of bars."""

from __future__ import annotations

import pytest

from kronos_stream.bars.effects import (
    Append,
    Gap,
    Reject,
    Revise,
)
from kronos_stream.market.candle import Bar, Candle
from tests.support.sequencer import (
    MINUTE,
    START,
    appended,
    candle,
    make_harness,
    request,
)


def test_bar_reported_closed_is_appended() -> None:
    harness = make_harness()
    assert harness.push(candle(0, 101), 10, closed=False) == []
    assert harness.push(candle(0), 60.02) == [Append(Bar(candle(0), received=START + 60_020))]
    assert harness.push(candle(0), 60.05) == []  # repeated
    assert harness.sequencer.next == START + MINUTE


def test_bar_without_closing_push_is_requested_after_the_grace_period() -> None:
    harness = make_harness()
    harness.push(candle(0, 101), 59, closed=False)
    assert harness.wake == 62
    assert harness.tick(61.9) == []
    assert harness.tick(62) == [request(0, 0)]
    assert harness.answer(request(0, 0), 62.1, candle(0)) == [
        Append(Bar(candle(0), received=START + 62_100))
    ]
    # The closing push comes late, and is the same.
    assert harness.push(candle(0), 63) == []


def test_later_bar_makes_the_previous_one_overdue_after_the_settle_time() -> None:
    harness = make_harness()
    harness.push(candle(0), 59, closed=False)
    harness.push(candle(1), 60.3, closed=False)
    assert harness.wake == 60.5
    assert harness.tick(60.5) == [Gap(START, START + MINUTE), request(0, 0)]


def test_bars_behind_a_gap_are_held_and_follow_in_order() -> None:
    harness = make_harness()
    assert harness.push(candle(0), 60) != []
    assert harness.push(candle(4), 300) == []
    assert harness.sequencer.has_gap
    assert harness.tick(300.2)[-1] == request(1, 3)  # exactly what is missing
    assert harness.push(candle(5), 360) == []
    effects = harness.answer(request(1, 3), 361, candle(1), candle(2), candle(3))
    assert appended(effects) == [candle(i) for i in range(1, 6)]
    assert not harness.sequencer.has_gap


def test_missing_bar_may_be_pushed_while_it_is_requested() -> None:
    harness = make_harness()
    harness.push(candle(1), 120)
    assert harness.tick(120.2)[-1] == request(0, 0)
    assert appended(harness.push(candle(0), 120.3)) == [candle(0), candle(1)]
    assert harness.answer(request(0, 0), 120.4, candle(0)) == []


def test_bar_is_not_appended_before_its_close_by_the_local_clock() -> None:
    harness = make_harness()
    assert harness.push(candle(0), 59.7) == []
    assert harness.wake == 60
    assert appended(harness.tick(60)) == [candle(0)]


def test_bar_reported_closed_too_early_is_rejected_and_requested() -> None:
    harness = make_harness()
    (effect,) = harness.push(candle(0), 30)
    assert effect == Reject(candle(0), "reported closed 30 s before its close")
    assert harness.push(candle(0), 31) == []  # reported once
    assert harness.tick(62) == [request(0, 0)]


def test_bar_reported_closed_early_and_pushed_as_open_again_is_rejected() -> None:
    harness = make_harness()
    harness.push(candle(0, 101), 58.5)
    (effect,) = harness.push(candle(0, 101.5), 59, closed=False)
    assert isinstance(effect, Reject)
    assert appended(harness.push(candle(0), 60)) == [candle(0)]


def test_bar_reported_closed_early_is_compared_with_the_history() -> None:
    harness = make_harness()
    harness.push(candle(0, 101), 59)
    effects = harness.tick(60)
    assert appended(effects) == [candle(0, 101)]
    assert effects[-1] == request(0, 0)
    (revised,) = harness.answer(request(0, 0), 60.2, candle(0))
    assert revised == Revise(Bar(candle(0), 1, received=START + 60_200), newest=True)


@pytest.mark.parametrize(
    ("invalid", "reason"),
    [
        (candle(0)._replace(high=1), "do not enclose"),
        (candle(0)._replace(volume=-1), "negative"),
        (candle(0)._replace(close=float("nan")), "finite"),
        (candle(0)._replace(time=START + 1), "no bar of 1m opens"),
        (candle(2), "opens 60 s in the future"),
    ],
)
def test_invalid_candle_is_rejected(invalid: Candle, reason: str) -> None:
    harness = make_harness()
    (effect,) = harness.push(invalid, 60)
    assert isinstance(effect, Reject)
    assert reason in effect.reason
    assert harness.tick(62) == [request(0, 0)]
    # An invalid candle of the history is rejected, too.
    assert (
        appended(harness.answer(request(0, 0), 63, invalid._replace(time=START, low=500.0))) == []
    )
    assert harness.sequencer.next == START


def test_bar_outside_the_requested_range_is_rejected() -> None:
    harness = make_harness()
    harness.tick(62)
    effects = harness.answer(request(0, 0), 130, candle(0), candle(1))
    assert appended(effects) == [candle(0)]
    assert Reject(candle(1), "outside the requested range") in effects
