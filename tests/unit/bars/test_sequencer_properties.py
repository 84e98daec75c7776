"""Sequencer: whatever a venue pushes, the result is its history (property test)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from kronos_stream.bars.effects import (
    Append,
    Confirm,
    Effect,
    Fetch,
    Revise,
)
from kronos_stream.market.candle import Bar, Candle
from tests.support.sequencer import (
    MINUTE,
    START,
    SequencerHarness,
    candle,
    make_harness,
)


@dataclass
class SimulatedVenue:
    """A sequencer, and a venue that pushes its bars correctly, late, early or wrongly."""

    revised: set[int]
    """Bars that the venue changes a minute after their close."""
    missing: set[int]
    """Bars that it does not have."""
    harness: SequencerHarness = field(default_factory=make_harness)
    now: float = 60.0
    """Seconds after START."""
    confirmed: dict[int, Bar] = field(default_factory=dict)
    mode: str = "answer"
    """Behaviour of the history: "answer", "fail" or "lag"."""

    def current(self, bar: int) -> Candle:
        changed = bar in self.revised and self.now >= 60 * (bar + 2)
        return candle(bar, 101.5 if changed else 100.5, volume=bar + 50)

    def push(self, kind: str, bar: int) -> None:
        """Push a bar that the venue has."""
        if bar < 0 or bar in self.missing:
            return
        left = 60 * (bar + 1) - self.now
        current = self.current(bar)
        if kind == "open":
            self.apply(self.harness.push(current._replace(volume=1), self.now, closed=False))
        elif kind == "closed" and left <= 0:
            self.apply(self.harness.push(current, self.now))
        elif kind == "stale" and left <= 0:
            self.apply(self.harness.push(candle(bar, volume=bar + 50), self.now))
        elif kind == "early" and left > 2:
            self.apply(self.harness.push(current._replace(volume=2), self.now))
        elif kind == "invalid":
            self.apply(self.harness.push(current._replace(low=-1), self.now))

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

    def answer(self, fetch: Fetch) -> None:
        if self.mode == "fail":
            self.harness.fail(self.now)
            return
        # A bar that has just closed may not be known yet.
        known = self.now - 3 if self.mode == "lag" else self.now
        first, end = ((moment - START) // MINUTE for moment in fetch)
        candles = [
            self.current(bar)
            for bar in range(max(0, first), end)
            if bar not in self.missing and 60 * (bar + 1) <= known
        ]
        self.apply(self.harness.answer(fetch, self.now, *candles))

    def settle(self, seconds: float) -> None:
        """Let time pass, with a tick at each wake-up."""
        end = self.now + seconds
        while self.harness.wake <= end:
            self.now = max(self.now, self.harness.wake)
            self.apply(self.harness.tick(self.now))
        self.now = end


_SCRIPTS = st.lists(
    st.tuples(
        st.sampled_from(["open", "closed", "stale", "early", "invalid", "nothing"]),
        st.integers(0, 3),  # how many bars back
        st.sampled_from([0.0, 0.05, 0.3, 1.0, 7.0, 25.0, 61.0, 200.0]),  # seconds until the next
        st.sampled_from(["answer", "answer", "fail", "lag"]),
    ),
    max_size=60,
)


_BARS = st.sets(st.integers(0, 30), max_size=6)


@settings(max_examples=300, deadline=None)
@given(_SCRIPTS, _BARS, _BARS)
def test_any_sequence_of_pushes_ends_with_the_bars_of_the_history(
    script: Sequence[tuple[str, int, float, str]], revised: set[int], empty: set[int]
) -> None:
    venue = SimulatedVenue(revised, empty)
    for kind, back, pause, mode in script:
        venue.mode = mode
        venue.push(kind, int(venue.now // 60) - back)
        venue.settle(pause)
    # From here on the venue works correctly.
    venue.mode = "answer"
    for _ in range(60):
        venue.settle(61 - venue.now % 60)
        venue.push("closed", int(venue.now // 60) - 1)
    bars_closed = int(venue.now // 60)
    assert list(venue.confirmed) == [START + bar * MINUTE for bar in range(bars_closed)]
    for number, bar in enumerate(venue.confirmed.values()):
        if number in empty:
            assert bar.synthetic
            assert bar.received
        else:
            assert bar == Bar(venue.current(number), bar.revision, received=bar.received)
