"""Sequencer: missing bars, placeholders, silent series and request pauses."""

from __future__ import annotations

from random import Random

from kronos_stream.bars.effects import (
    Append,
    Confirm,
    Fetch,
    Revise,
    Silence,
)
from kronos_stream.bars.sequencer import BarSequencer
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.timeframe import Timeframe
from tests.support.sequencer import (
    HISTORY,
    START,
    appended,
    candle,
    make_harness,
    request,
)


def test_bar_that_the_history_lacks_becomes_flat() -> None:
    harness = make_harness()
    harness.push(candle(1), 120)
    assert harness.tick(120.2)[-1] == request(0, 0)
    assert harness.answer(request(0, 0), 120.3) == []  # it may lag behind: requested again
    assert harness.tick(122) == [request(0, 0)]
    price = 100.5
    flat = Candle(START, price, price, price, price, 0.0, 0.0)
    assert harness.answer(request(0, 0), 122.1) == [
        Append(Bar(flat, synthetic=True, received=START + 122_100)),
        Append(Bar(candle(1), received=START + 120_000)),
    ]


def test_bar_does_not_become_flat_before_the_history_lag_is_over() -> None:
    harness = make_harness()
    harness.push(candle(1), 60.1, closed=False)
    while harness.wake < 65:
        seconds = harness.wake
        assert harness.tick(seconds)[-1] == request(0, 0)
        assert appended(harness.answer(request(0, 0), seconds)) == []
    assert harness.tick(harness.wake)[-1] == request(0, 0)
    assert len(appended(harness.answer(request(0, 0), 69))) == 1


def test_bar_does_not_become_flat_without_a_sign_that_the_venue_is_alive() -> None:
    harness = make_harness()
    for seconds in range(62, 3000, 90):
        assert harness.tick(seconds) != []
        assert (
            appended(
                harness.answer(harness.sequencer._backfill.pending or request(0, 0), seconds + 1)
            )
            == []
        )
    assert harness.sequencer.silent
    assert harness.effects.count(Silence(silent=True)) == 1
    assert not harness.sequencer.live


def test_quiet_symbol_gets_a_limited_number_of_flat_bars() -> None:
    harness = make_harness(fills_empty=False)
    for seconds in range(62, 60 * 200, 10):
        for effect in harness.tick(seconds):
            if isinstance(effect, Fetch):
                harness.answer(effect, seconds)
    assert len(appended(harness.effects)) == 60
    assert harness.sequencer.silent


def test_real_bar_replaces_a_flat_one() -> None:
    harness = make_harness()
    harness.push(candle(1), 120)
    for seconds in (120.2, 122):
        harness.tick(seconds)
        harness.answer(request(0, 0), seconds + 0.1)
    assert harness.push(candle(0), 130) == [
        Revise(Bar(candle(0), 1, received=START + 130_000), newest=False)
    ]


def test_failing_history_makes_no_flat_bars() -> None:
    harness = make_harness()
    harness.push(candle(0), 60)
    for seconds in range(122, 3000, 100):
        if harness.tick(seconds):
            harness.fail(seconds + 1)
    assert appended(harness.effects) == [candle(0)]
    assert not harness.sequencer.silent  # unknown while the history fails


def test_placeholder_fills_the_gap_after_the_hold_time() -> None:
    harness = make_harness()
    seconds = 120.0
    for i in range(1, 14):
        harness.push(candle(i), 60 * (i + 1))
        seconds = 60 * (i + 1) + 1
        if any(isinstance(effect, Fetch) for effect in harness.tick(seconds)):
            harness.fail(seconds + 1)
    placeholder, *rest = [effect.bar for effect in harness.effects if isinstance(effect, Append)]
    assert placeholder.synthetic
    assert placeholder.received == 0
    assert [bar.candle for bar in rest] == [candle(i) for i in range(1, 14)]
    # The history answers again: the real bar replaces the placeholder.
    harness.sequencer.tick(START + 3_000_000)
    assert harness.answer(request(0, 0), 3000.1, candle(0))[0] == Revise(
        Bar(candle(0), 1, received=START + 3_000_100), newest=False
    )


def test_placeholder_without_a_real_bar_is_confirmed() -> None:
    bars = [Bar(candle(i), received=1) for i in range(-HISTORY, 0)]
    bars[-2] = Bar(candle(-2), synthetic=True, received=0)
    harness = make_harness(bars=bars)
    assert harness.effects == [request(-2, -2)]
    assert harness.answer(request(-2, -2), 0.1) == []
    assert harness.tick(2) == [request(-2, -2)]
    assert harness.answer(request(-2, -2), 2.1) == [
        Confirm(Bar(candle(-2), synthetic=True, received=START + 2_100))
    ]


def test_request_pauses_grow_and_respect_retry_after() -> None:
    harness = make_harness()
    harness.tick(62)
    harness.fail(62, retry_after=300)
    assert harness.wake >= 362
    pauses = []
    for _ in range(9):
        now = harness.wake
        harness.tick(now)
        harness.fail(now)
        pauses.append(harness.wake - now)
    assert pauses == sorted(pauses) or pauses[-1] >= 60
    assert pauses[-1] <= 75


def test_placeholder_is_replaced_although_the_venues_clock_is_behind() -> None:
    """At 4 s behind each bar seems late and is requested in vain (chaos run, fault seed 125)."""
    behind = 4_000

    def bar(time: int) -> Candle:
        return Candle(time, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)

    bars = [Bar(bar(START + 1000 * i)) for i in range(-44, -4)]
    placeholder = bar(bars[-5].candle.time)._replace(volume=0.0)
    bars[-5] = Bar(placeholder, synthetic=True)
    sequencer = BarSequencer(
        Timeframe(1, "s"), Random(1), grace_seconds=2.0, history_lag_seconds=None, fills_empty=True,
        history_bars=40, bars=bars, complete=True,
    )  # fmt: skip
    revised = []
    for now in range(START, START + 180_000, 100):
        venue_time = now - behind
        if (venue_time - 1) // 1000 != (venue_time - 101) // 1000:  # a bar has closed there
            sequencer.update(bar(venue_time // 1000 * 1000 - 1000), True, now)  # noqa: FBT003
        for effect in sequencer.tick(now):
            if isinstance(effect, Fetch):
                last = min(effect.end, venue_time // 1000 * 1000)
                answer = [bar(time) for time in range(effect.start, last, 1000)]
                effects = sequencer.fetch_completed(effect, answer, now)
                revised += [one for one in effects if isinstance(one, Revise)]
    assert [one.bar.candle.time for one in revised] == [placeholder.time]
