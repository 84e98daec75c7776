"""Sequencer: corrections of confirmed bars."""

from __future__ import annotations

from kronos_stream.bars.effects import (
    Effect,
    Fetch,
    Revise,
)
from kronos_stream.market.candle import Bar, Candle
from tests.support.sequencer import (
    HISTORY,
    MINUTE,
    START,
    candle,
    make_harness,
    request,
)


def test_push_with_other_values_revises_the_newest_bar_if_the_history_agrees() -> None:
    harness = make_harness()
    harness.push(candle(0), 60)
    assert harness.push(candle(0, 101), 70) == []
    assert harness.wake == 70.2
    assert harness.tick(70.2) == [request(0, 0)]
    assert harness.answer(request(0, 0), 70.3, candle(0, 101)) == [
        Revise(Bar(candle(0, 101), 1, received=START + 70_300), newest=True)
    ]


def test_older_bar_is_revised() -> None:
    harness = make_harness()
    harness.push(candle(0), 60)
    harness.push(candle(1), 120)
    harness.push(candle(0, 101), 121)
    harness.tick(121.2)
    (effect,) = harness.answer(request(0, 0), 121.3, candle(0, 101))
    assert isinstance(effect, Revise)
    assert not effect.newest


def test_stale_push_changes_nothing() -> None:
    harness = make_harness()
    harness.push(candle(0, 101), 60)
    harness.push(candle(0), 60.5)
    seconds = 60.7
    while harness.wake < 90:
        seconds = max(seconds, harness.wake)
        assert harness.tick(seconds) == [request(0, 0)]
        assert harness.answer(request(0, 0), seconds + 0.1, candle(0, 101)) == []
    assert 65.5 < seconds < 75  # the history had its time to catch up


def test_history_that_lags_behind_the_correction_is_requested_again() -> None:
    harness = make_harness()
    harness.push(candle(0), 60)
    harness.push(candle(0, 101), 61)
    assert harness.tick(61.2) == [request(0, 0)]
    assert harness.answer(request(0, 0), 61.3, candle(0)) == []
    assert harness.tick(62.7) == [request(0, 0)]
    assert len(harness.answer(request(0, 0), 62.8, candle(0, 101))) == 1


def test_push_decides_if_the_history_lacks_the_bar() -> None:
    harness = make_harness()
    harness.push(candle(0), 60)
    harness.push(candle(0, 101), 61)
    for seconds in (61.2, 67):
        assert harness.tick(seconds) == [request(0, 0)]
        effects = harness.answer(request(0, 0), seconds + 0.1)
    assert effects == [Revise(Bar(candle(0, 101), 1, received=START + 67_100), newest=True)]


def test_audit_finds_a_correction_that_was_not_pushed() -> None:
    harness = make_harness()
    for i in range(16):
        harness.push(candle(i), 60 * (i + 1))
    (fetch,) = harness.tick(60 * 16 + 1)
    assert fetch == Fetch(START - HISTORY * MINUTE, START + 16 * MINUTE)
    history = [candle(i) for i in range(-HISTORY, 16)]
    history[-3] = candle(13, 101)
    assert harness.answer(fetch, 962, *history) == []
    assert harness.tick(962.3) == [request(13, 13)]
    (effect,) = harness.answer(request(13, 13), 962.4, candle(13, 101))
    assert isinstance(effect, Revise)


def effects_of_open_push(pushed: Candle, *history: Candle) -> list[Effect]:
    """Effects within half a minute of the push, from a venue that never reports bars closed."""
    harness = make_harness()
    harness.effects.clear()
    harness.push(pushed, 5, closed=False)
    while harness.wake < 30:
        now = max(harness.wake, 5)
        for fetch in [one for one in harness.tick(now) if isinstance(one, Fetch)]:
            answer = [one for one in history if fetch.start <= one.time < fetch.end]
            harness.answer(fetch, now + 0.05, *answer)
    return harness.effects


def test_late_open_push_is_a_revision_if_the_history_differs() -> None:
    changed = candle(-1, 101.0)
    effects = effects_of_open_push(candle(-1, 100.9), candle(-2), changed)
    (found,) = [effect for effect in effects if isinstance(effect, Revise)]
    assert (found.bar.candle, found.bar.revision, found.newest) == (changed, 1, True)


def test_late_open_push_that_the_history_contradicts_is_given_up() -> None:
    effects = effects_of_open_push(candle(-3, 100.9), *(candle(i) for i in range(-50, 0)))
    requests = [effect for effect in effects if isinstance(effect, Fetch)]
    assert 2 <= len(requests) <= 6
    assert effects == requests


def test_late_open_push_of_a_bar_that_the_history_lacks_changes_nothing() -> None:
    effects = effects_of_open_push(candle(-3, 100.9))
    assert effects
    assert not [effect for effect in effects if isinstance(effect, Revise)]


def test_repeated_open_push_requests_nothing() -> None:
    assert effects_of_open_push(candle(-1), candle(-1)) == []
