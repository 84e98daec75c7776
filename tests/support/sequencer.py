"""Harness of the bar sequencer's tests: a series of 1m bars, numbered from START."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from kronos_stream.bars.effects import Append, Effect, Fetch
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
    """Drives a sequencer of 1m bars; bars are numbered from START, times are seconds after it."""

    sequencer: BarSequencer
    effects: list[Effect] = field(default_factory=list)

    def push(self, pushed: Candle, seconds: float, *, closed: bool = True) -> list[Effect]:
        return self._record(self.sequencer.update(pushed, closed, START + round(seconds * 1000)))

    def tick(self, seconds: float) -> list[Effect]:
        return self._record(self.sequencer.tick(START + round(seconds * 1000)))

    def answer(self, fetch: Fetch, seconds: float, *candles: Candle) -> list[Effect]:
        return self._record(
            self.sequencer.fetch_completed(fetch, candles, START + round(seconds * 1000))
        )

    def fail(self, seconds: float, retry_after: float = 0) -> None:
        self.sequencer.fetch_failed(START + round(seconds * 1000), retry_after)

    @property
    def wake(self) -> float:
        """Time of the next wake-up."""
        return (self.sequencer.next_wakeup - START) / 1000

    def _record(self, effects: Sequence[Effect]) -> list[Effect]:
        self.effects.extend(effects)
        return list(effects)


def make_harness(
    *, fills_empty: bool = True, bars: Sequence[Bar] | None = None, complete: bool = True
) -> SequencerHarness:
    """Make a sequencer that has the bars up to the one that opens a minute before START."""
    if bars is None:
        bars = [Bar(candle(i), received=1) for i in range(-HISTORY, 0)]
    sequencer = BarSequencer(
        Timeframe.parse("1m"),
        Random(0),
        grace_seconds=2,
        history_lag_seconds=None,
        fills_empty=fills_empty,
        history_bars=HISTORY,
        bars=bars,
        complete=complete,
    )
    harness = SequencerHarness(sequencer)
    if bars and complete:
        harness.tick(0)
        sequencer._backfill.next_audit = START + 15 * MINUTE  # otherwise random
    return harness


def request(first: int, last: int) -> Fetch:
    """Request for the bars ``first`` to ``last``."""
    return Fetch(START + first * MINUTE, START + (last + 1) * MINUTE)


def appended(effects: Sequence[Effect]) -> list[Candle]:
    return [effect.bar.candle for effect in effects if isinstance(effect, Append)]
