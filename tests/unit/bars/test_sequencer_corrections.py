"""Where a venue never says that a bar is closed, a late push of another content asks a question."""

from __future__ import annotations

from random import Random

from kronos_stream.bars.effects import Effect, Fetch, Revise
from kronos_stream.bars.sequencer import BarSequencer
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.timeframe import Timeframe

MINUTE = 60_000
START = 1_718_712_000_000


def candle(bar: int, close: float = 100.5) -> Candle:
    return Candle(START + bar * MINUTE, 100.0, 102.0, 99.0, close, 3.0)


def make_sequencer() -> BarSequencer:
    """It has the bars up to the one that opens a minute before START."""
    return BarSequencer(
        Timeframe(1, "m"),
        Random(0),
        grace_seconds=2,
        history_lag_seconds=None,
        fills_empty=True,
        history_bars=50,
        bars=[Bar(candle(i), received=1) for i in range(-50, 0)],
        complete=True,
    )


def play(one: BarSequencer, pushed: Candle, *history: Candle) -> list[Effect]:
    """What follows within half a minute from a push, while the venue has these bars, too."""
    said = list(one.update(pushed, False, START + 5_000))  # noqa: FBT003 - closed
    while one.next_wakeup < START + 30_000:
        now = max(one.next_wakeup, START + 5_000)
        effects = list(one.tick(now))
        for asked in [effect for effect in effects if isinstance(effect, Fetch)]:
            found = [one for one in history if asked.start <= one.time < asked.end]
            effects += one.fetch_completed(asked, found, now + 50)
        said += effects
    return said


def test_what_the_history_confirms_is_a_revision() -> None:
    changed = candle(-1, 101.0)
    said = play(make_sequencer(), candle(-1, 100.9), candle(-2), changed)
    (found,) = [effect for effect in said if isinstance(effect, Revise)]
    assert (found.bar.candle, found.bar.revision, found.newest) == (changed, 1, True)


def test_what_it_does_not_confirm_changes_nothing_and_is_not_asked_for_for_ever() -> None:
    said = play(make_sequencer(), candle(-3, 100.9), *(candle(i) for i in range(-50, 0)))
    asked = [effect for effect in said if isinstance(effect, Fetch)]
    assert 2 <= len(asked) <= 6
    assert said == asked


def test_what_it_does_not_have_any_more_changes_nothing() -> None:
    said = play(make_sequencer(), candle(-3, 100.9))
    assert not [effect for effect in said if isinstance(effect, Revise)]


def test_the_same_again_asks_nothing() -> None:
    assert play(make_sequencer(), candle(-1), candle(-1)) == []
