"""The tape: what it makes of what a venue says, does not say, says twice, late or wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kronos_stream.bars.effects import (
    Append,
    Begin,
    Confirm,
    Effect,
    Fetch,
    Gap,
    Reject,
    Revise,
    Silence,
)
from kronos_stream.bars.sequencer import BarSequencer
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.timeframe import Timeframe

MINUTE = 60_000
START = 1_718_712_000_000
HISTORY = 50


def candle(bar: int, close: float = 100.5, volume: float = 3.0) -> Candle:
    return Candle(START + bar * MINUTE, 100.0, 102.0, 99.0, close, volume, 300.0)


@dataclass
class SequencerHarness:
    """A tape of 1m bars on a bench: bars are numbered from START, moments are seconds after it."""

    tape: BarSequencer
    effects: list[Effect] = field(default_factory=list)

    def push(self, one: Candle, seconds: float, *, closed: bool = True) -> list[Effect]:
        return self._record(self.tape.update(one, closed, START + round(seconds * 1000)))

    def tick(self, seconds: float) -> list[Effect]:
        return self._record(self.tape.tick(START + round(seconds * 1000)))

    def answer(self, asked: Fetch, seconds: float, *candles: Candle) -> list[Effect]:
        return self._record(
            self.tape.fetch_completed(asked, candles, START + round(seconds * 1000))
        )

    def fail(self, seconds: float, retry_after: float = 0) -> None:
        self.tape.fetch_failed(START + round(seconds * 1000), retry_after)

    @property
    def wake(self) -> float:
        """Seconds after START."""
        return (self.tape.next_wakeup - START) / 1000

    def _record(self, effects: Sequence[Effect]) -> list[Effect]:
        self.effects.extend(effects)
        return list(effects)


def make_sequencer(
    *, fills_empty: bool = True, known: Sequence[Bar] | None = None, whole: bool = True
) -> SequencerHarness:
    """A tape that has the bars up to the one that opens a minute before START."""
    if known is None:
        known = [Bar(candle(i), received=1) for i in range(-HISTORY, 0)]
    tape = BarSequencer(
        Timeframe.parse("1m"),
        Random(0),
        grace_seconds=2,
        history_lag_seconds=None,
        fills_empty=fills_empty,
        history_bars=HISTORY,
        bars=known,
        complete=whole,
    )
    here = SequencerHarness(tape)
    if known and whole:
        here.tick(0)
        tape._backfill.next_audit = START + 15 * MINUTE  # otherwise by chance
    return here


def fetch(first: int, last: int) -> Fetch:
    """The question for bars ``first`` to ``last``."""
    return Fetch(START + first * MINUTE, START + (last + 1) * MINUTE)


def bars(effects: Sequence[Effect]) -> list[Candle]:
    return [effect.bar.candle for effect in effects if isinstance(effect, Append)]


def test_a_bar_said_to_be_closed_is_appended() -> None:
    here = make_sequencer()
    assert here.push(candle(0, 101), 10, closed=False) == []
    assert here.push(candle(0), 60.02) == [Append(Bar(candle(0), received=START + 60_020))]
    assert here.push(candle(0), 60.05) == []  # the same again
    assert here.tape.next == START + MINUTE


def test_a_bar_without_its_last_word_is_asked_for_after_its_grace() -> None:
    here = make_sequencer()
    here.push(candle(0, 101), 59, closed=False)
    assert here.wake == 62
    assert here.tick(61.9) == []
    assert here.tick(62) == [fetch(0, 0)]
    assert here.answer(fetch(0, 0), 62.1, candle(0)) == [
        Append(Bar(candle(0), received=START + 62_100))
    ]
    # Its last word comes late, and says nothing new.
    assert here.push(candle(0), 63) == []


def test_a_later_bar_makes_the_one_before_asked_for_at_once_but_not_before_it_may_cross() -> None:
    here = make_sequencer()
    here.push(candle(0), 59, closed=False)
    here.push(candle(1), 60.3, closed=False)
    assert here.wake == 60.5
    assert here.tick(60.5) == [Gap(START, START + MINUTE), fetch(0, 0)]


def test_bars_behind_a_hole_wait_and_follow_in_order() -> None:
    here = make_sequencer()
    assert here.push(candle(0), 60) != []
    assert here.push(candle(4), 300) == []
    assert here.tape.has_gap
    assert here.tick(300.2)[-1] == fetch(1, 3)  # exactly what is missing
    assert here.push(candle(5), 360) == []
    said = here.answer(fetch(1, 3), 361, candle(1), candle(2), candle(3))
    assert bars(said) == [candle(i) for i in range(1, 6)]
    assert not here.tape.has_gap


def test_the_missing_bar_may_come_while_it_is_asked_for() -> None:
    here = make_sequencer()
    here.push(candle(1), 120)
    assert here.tick(120.2)[-1] == fetch(0, 0)
    assert bars(here.push(candle(0), 120.3)) == [candle(0), candle(1)]
    assert here.answer(fetch(0, 0), 120.4, candle(0)) == []


def test_a_bar_is_never_closed_before_its_close_by_our_clock() -> None:
    here = make_sequencer()
    assert here.push(candle(0), 59.7) == []
    assert here.wake == 60
    assert bars(here.tick(60)) == [candle(0)]


def test_a_bar_closed_long_before_its_close_is_a_lie_and_asked_for() -> None:
    here = make_sequencer()
    (said,) = here.push(candle(0), 30)
    assert said == Reject(candle(0), "reported closed 30 s before its close")
    assert here.push(candle(0), 31) == []  # once is enough
    assert here.tick(62) == [fetch(0, 0)]


def test_a_bar_pushed_as_open_after_it_was_closed_early_was_a_lie() -> None:
    here = make_sequencer()
    here.push(candle(0, 101), 58.5)
    (said,) = here.push(candle(0, 101.5), 59, closed=False)
    assert isinstance(said, Reject)
    assert bars(here.push(candle(0), 60)) == [candle(0)]


def test_a_bar_closed_early_is_compared_with_the_history() -> None:
    here = make_sequencer()
    here.push(candle(0, 101), 59)
    said = here.tick(60)
    assert bars(said) == [candle(0, 101)]
    assert said[-1] == fetch(0, 0)
    (revised,) = here.answer(fetch(0, 0), 60.2, candle(0))
    assert revised == Revise(Bar(candle(0), 1, received=START + 60_200), newest=True)


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (candle(0)._replace(high=1), "do not enclose"),
        (candle(0)._replace(volume=-1), "negative"),
        (candle(0)._replace(close=float("nan")), "finite"),
        (candle(0)._replace(time=START + 1), "no bar of 1m opens"),
        (candle(2), "opens 60 s in the future"),
    ],
)
def test_what_cannot_be_stays_off_the_tape(one: Candle, reason: str) -> None:
    here = make_sequencer()
    (said,) = here.push(one, 60)
    assert isinstance(said, Reject)
    assert reason in said.reason
    assert here.tick(62) == [fetch(0, 0)]
    # Nor does it get there by the history.
    assert bars(here.answer(fetch(0, 0), 63, one._replace(time=START, low=500.0))) == []
    assert here.tape.next == START


def test_a_bar_beyond_what_was_asked_for_is_not_taken() -> None:
    here = make_sequencer()
    here.tick(62)
    said = here.answer(fetch(0, 0), 130, candle(0), candle(1))
    assert bars(said) == [candle(0)]
    assert Reject(candle(1), "outside the requested range") in said


def test_other_values_of_the_newest_bar_are_confirmed_and_revise_it() -> None:
    here = make_sequencer()
    here.push(candle(0), 60)
    assert here.push(candle(0, 101), 70) == []
    assert here.wake == 70.2
    assert here.tick(70.2) == [fetch(0, 0)]
    assert here.answer(fetch(0, 0), 70.3, candle(0, 101)) == [
        Revise(Bar(candle(0, 101), 1, received=START + 70_300), newest=True)
    ]


def test_an_older_bar_is_revised_late() -> None:
    here = make_sequencer()
    here.push(candle(0), 60)
    here.push(candle(1), 120)
    here.push(candle(0, 101), 121)
    here.tick(121.2)
    (said,) = here.answer(fetch(0, 0), 121.3, candle(0, 101))
    assert isinstance(said, Revise)
    assert not said.newest


def test_an_old_word_that_comes_late_changes_nothing() -> None:
    here = make_sequencer()
    here.push(candle(0, 101), 60)
    here.push(candle(0), 60.5)
    seconds = 60.7
    while here.wake < 90:
        seconds = max(seconds, here.wake)
        assert here.tick(seconds) == [fetch(0, 0)]
        assert here.answer(fetch(0, 0), seconds + 0.1, candle(0, 101)) == []
    assert 65.5 < seconds < 75  # the history was given its time to know better


def test_a_history_that_learns_of_the_change_later_is_asked_until_then() -> None:
    here = make_sequencer()
    here.push(candle(0), 60)
    here.push(candle(0, 101), 61)
    assert here.tick(61.2) == [fetch(0, 0)]
    assert here.answer(fetch(0, 0), 61.3, candle(0)) == []
    assert here.tick(62.7) == [fetch(0, 0)]
    assert len(here.answer(fetch(0, 0), 62.8, candle(0, 101))) == 1


def test_where_the_history_does_not_have_the_bar_the_push_is_believed() -> None:
    here = make_sequencer()
    here.push(candle(0), 60)
    here.push(candle(0, 101), 61)
    for seconds in (61.2, 67):
        assert here.tick(seconds) == [fetch(0, 0)]
        said = here.answer(fetch(0, 0), seconds + 0.1)
    assert said == [Revise(Bar(candle(0, 101), 1, received=START + 67_100), newest=True)]


def test_a_change_that_was_never_pushed_is_found_by_the_audit() -> None:
    here = make_sequencer()
    for i in range(16):
        here.push(candle(i), 60 * (i + 1))
    (asked,) = here.tick(60 * 16 + 1)
    assert asked == Fetch(START - HISTORY * MINUTE, START + 16 * MINUTE)
    truth = [candle(i) for i in range(-HISTORY, 16)]
    truth[-3] = candle(13, 101)
    assert here.answer(asked, 962, *truth) == []
    assert here.tick(962.3) == [fetch(13, 13)]
    (said,) = here.answer(fetch(13, 13), 962.4, candle(13, 101))
    assert isinstance(said, Revise)


def test_what_a_living_history_does_not_have_becomes_flat() -> None:
    here = make_sequencer()
    here.push(candle(1), 120)
    assert here.tick(120.2)[-1] == fetch(0, 0)
    assert here.answer(fetch(0, 0), 120.3) == []  # it may not know yet: once more
    assert here.tick(122) == [fetch(0, 0)]
    price = 100.5
    flat = Candle(START, price, price, price, price, 0.0, 0.0)
    assert here.answer(fetch(0, 0), 122.1) == [
        Append(Bar(flat, synthetic=True, received=START + 122_100)),
        Append(Bar(candle(1), received=START + 120_000)),
    ]


def test_not_before_the_history_had_time_to_know() -> None:
    here = make_sequencer()
    here.push(candle(1), 60.1, closed=False)
    while here.wake < 65:
        seconds = here.wake
        assert here.tick(seconds)[-1] == fetch(0, 0)
        assert bars(here.answer(fetch(0, 0), seconds)) == []
    assert here.tick(here.wake)[-1] == fetch(0, 0)
    assert len(bars(here.answer(fetch(0, 0), 69))) == 1


def test_not_while_nothing_shows_the_venue_alive() -> None:
    here = make_sequencer()
    for seconds in range(62, 3000, 90):
        assert here.tick(seconds) != []
        assert bars(here.answer(here.tape._backfill.pending or fetch(0, 0), seconds + 1)) == []
    assert here.tape.silent
    assert here.effects.count(Silence(silent=True)) == 1
    assert not here.tape.live


def test_a_quiet_symbol_gets_them_by_the_clock_but_not_for_ever() -> None:
    here = make_sequencer(fills_empty=False)
    for seconds in range(62, 60 * 200, 10):
        for effect in here.tick(seconds):
            if isinstance(effect, Fetch):
                here.answer(effect, seconds)
    assert len(bars(here.effects)) == 60
    assert here.tape.silent


def test_real_data_takes_the_mark_away() -> None:
    here = make_sequencer()
    here.push(candle(1), 120)
    for seconds in (120.2, 122):
        here.tick(seconds)
        here.answer(fetch(0, 0), seconds + 0.1)
    assert here.push(candle(0), 130) == [
        Revise(Bar(candle(0), 1, received=START + 130_000), newest=False)
    ]


def test_a_dead_history_makes_none() -> None:
    here = make_sequencer()
    here.push(candle(0), 60)
    for seconds in range(122, 3000, 100):
        if here.tick(seconds):
            here.fail(seconds + 1)
    assert bars(here.effects) == [candle(0)]
    assert not here.tape.silent  # who cannot ask does not know


def test_held_bars_go_on_after_patience_and_the_hole_is_owed() -> None:
    here = make_sequencer()
    seconds = 120.0
    for i in range(1, 14):
        here.push(candle(i), 60 * (i + 1))
        seconds = 60 * (i + 1) + 1
        if any(isinstance(effect, Fetch) for effect in here.tick(seconds)):
            here.fail(seconds + 1)
    made_up, *rest = [effect.bar for effect in here.effects if isinstance(effect, Append)]
    assert made_up.synthetic
    assert made_up.received == 0
    assert [bar.candle for bar in rest] == [candle(i) for i in range(1, 14)]
    # Back again: the real bar takes its place.
    here.tape.tick(START + 3_000_000)
    assert here.answer(fetch(0, 0), 3000.1, candle(0))[0] == Revise(
        Bar(candle(0), 1, received=START + 3_000_100), newest=False
    )


def test_an_owed_bar_that_is_not_there_is_confirmed() -> None:
    known = [Bar(candle(i), received=1) for i in range(-HISTORY, 0)]
    known[-2] = Bar(candle(-2), synthetic=True, received=0)
    here = make_sequencer(known=known)
    assert here.effects == [fetch(-2, -2)]
    assert here.answer(fetch(-2, -2), 0.1) == []
    assert here.tick(2) == [fetch(-2, -2)]
    assert here.answer(fetch(-2, -2), 2.1) == [
        Confirm(Bar(candle(-2), synthetic=True, received=START + 2_100))
    ]


def test_pauses_grow_and_respect_the_venue() -> None:
    here = make_sequencer()
    here.tick(62)
    here.fail(62, retry_after=300)
    assert here.wake >= 362
    pauses = []
    for _ in range(9):
        now = here.wake
        here.tick(now)
        here.fail(now)
        pauses.append(here.wake - now)
    assert pauses == sorted(pauses) or pauses[-1] >= 60
    assert pauses[-1] <= 75


def test_the_history_comes_first_and_is_appended() -> None:
    here = make_sequencer(known=())
    begin, asked = here.tick(30)
    assert begin == Begin(START + 30_000 - MINUTE)
    assert asked == Fetch(START + 30_000 - HISTORY * MINUTE, START + 30_000)
    assert isinstance(asked, Fetch)
    assert here.push(candle(0), 60) == []  # held meanwhile
    said = here.answer(asked, 61, *(candle(i) for i in range(-40, 0)))
    assert bars(said) == [candle(i) for i in range(-40, 1)]


def test_a_venue_without_history_begins_with_what_it_pushes() -> None:
    here = make_sequencer(known=())
    asked = here.tick(30)[-1]
    assert isinstance(asked, Fetch)
    assert here.answer(asked, 31) == []
    here.push(candle(0), 40, closed=False)
    assert bars(here.push(candle(0), 60)) == [candle(0)]


def test_too_few_saved_bars_are_joined_with_the_history() -> None:
    known = [Bar(candle(i), revision=2, received=1) for i in range(-5, -2)]
    here = make_sequencer(known=known, whole=False)
    asked = here.tick(10)[-1]
    assert isinstance(asked, Fetch)
    said = here.answer(asked, 11, *(candle(i) for i in range(-20, 0)))
    kept = {effect.bar.candle.time: effect.bar for effect in said if isinstance(effect, Append)}
    assert list(kept) == [START + i * MINUTE for i in range(-20, 0)]
    assert [kept[START + i * MINUTE].revision for i in range(-6, -1)] == [0, 2, 2, 2, 0]


def test_after_a_restart_exactly_what_is_missing_is_asked_for() -> None:
    tape = make_sequencer().tape
    assert tape.tick(START + 10 * MINUTE + 5_000) == [
        Fetch(START, START + 10 * MINUTE),
    ]


def test_weeks_follow_the_venue() -> None:
    week = 7 * 86_400_000
    monday = 1_718_582_400_000  # 2024-06-17
    tape = BarSequencer(
        Timeframe.parse("1w"),
        Random(0),
        grace_seconds=2,
        history_lag_seconds=None,
        fills_empty=True,
        history_bars=10,
    )
    now = monday + 5_000
    asked = tape.tick(now)[-1]
    assert isinstance(asked, Fetch)
    history = [candle(0)._replace(time=monday - i * week) for i in (3, 2, 1)]
    assert bars(tape.fetch_completed(asked, history, now)) == history
    (said,) = tape.update(candle(0)._replace(time=monday - week + 86_400_000), True, now)  # noqa: FBT003
    assert isinstance(said, Reject)
    assert tape.next == monday


# Any telling of the truth ends as the truth.


@dataclass
class SimulatedVenue:
    """A tape and the truth, which is told to it in one way or another."""

    revised: set[int]
    """Bars that the venue changes a minute after their close."""
    missing: set[int]
    """Bars that it does not have."""
    harness: SequencerHarness = field(default_factory=make_sequencer)
    now: float = 60.0
    """Seconds after START."""
    confirmed: dict[int, Bar] = field(default_factory=dict)
    mode: str = "answer"

    def truth(self, bar: int) -> Candle:
        changed = bar in self.revised and self.now >= 60 * (bar + 2)
        return candle(bar, 101.5 if changed else 100.5, volume=bar + 50)

    def push(self, what: str, bar: int) -> None:
        """Push a bar, unless the venue would have nothing to say of it."""
        if bar < 0 or bar in self.missing:
            return
        left = 60 * (bar + 1) - self.now
        true = self.truth(bar)
        if what == "open":
            self.apply(self.harness.push(true._replace(volume=1), self.now, closed=False))
        elif what == "last" and left <= 0:
            self.apply(self.harness.push(true, self.now))
        elif what == "old" and left <= 0:
            self.apply(self.harness.push(candle(bar, volume=bar + 50), self.now))
        elif what == "lie" and left > 2:
            self.apply(self.harness.push(true._replace(volume=2), self.now))
        elif what == "absurd":
            self.apply(self.harness.push(true._replace(low=-1), self.now))

    def apply(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Fetch):
                self.answer(effect)
            elif isinstance(effect, (Append, Revise, Confirm)):
                self.check(effect)

    def check(self, effect: Append | Revise | Confirm) -> None:
        time = effect.bar.candle.time
        if isinstance(effect, Append):
            assert time == max(self.confirmed, default=START - MINUTE) + MINUTE
            assert time + MINUTE <= START + self.now * 1000
        elif isinstance(effect, Revise):
            assert effect.bar.revision == self.confirmed[time].revision + 1
            assert effect.newest == (time == max(self.confirmed))
        self.confirmed[time] = effect.bar

    def answer(self, asked: Fetch) -> None:
        if self.mode == "fail":
            self.harness.fail(self.now)
            return
        # What has just closed may not be known yet.
        known = self.now - 3 if self.mode == "lag" else self.now
        first, end = ((moment - START) // MINUTE for moment in asked)
        said = [
            self.truth(bar)
            for bar in range(max(0, first), end)
            if bar not in self.missing and 60 * (bar + 1) <= known
        ]
        self.apply(self.harness.answer(asked, self.now, *said))

    def settle(self, seconds: float) -> None:
        """Let time pass, as the desk does."""
        end = self.now + seconds
        while self.harness.wake <= end:
            self.now = max(self.now, self.harness.wake)
            self.apply(self.harness.tick(self.now))
        self.now = end


_SCRIPTS = st.lists(
    st.tuples(
        st.sampled_from(["open", "last", "old", "lie", "absurd", "nothing"]),
        st.integers(0, 3),  # how many bars back
        st.sampled_from([0.0, 0.05, 0.3, 1.0, 7.0, 25.0, 61.0, 200.0]),  # seconds until the next
        st.sampled_from(["answer", "answer", "fail", "lag"]),
    ),
    max_size=60,
)
_BARS = st.sets(st.integers(0, 30), max_size=6)


@settings(max_examples=300, deadline=None)
@given(_SCRIPTS, _BARS, _BARS)
def test_any_telling_of_the_truth_ends_as_the_truth(
    speech: Sequence[tuple[str, int, float, str]], revised: set[int], empty: set[int]
) -> None:
    telling = SimulatedVenue(revised, empty)
    for what, back, pause, mode in speech:
        telling.mode = mode
        telling.push(what, int(telling.now // 60) - back)
        telling.settle(pause)
    # From here on the venue is in order.
    telling.mode = "answer"
    for _ in range(60):
        telling.settle(61 - telling.now % 60)
        telling.push("last", int(telling.now // 60) - 1)
    bars_closed = int(telling.now // 60)
    assert list(telling.confirmed) == [START + bar * MINUTE for bar in range(bars_closed)]
    for number, bar in enumerate(telling.confirmed.values()):
        if number in empty:
            assert bar.synthetic
            assert bar.received
        else:
            assert bar == Bar(telling.truth(number), bar.revision, received=bar.received)
