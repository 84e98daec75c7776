"""Corrections of confirmed bars that the venue's history has not verified yet.

A closed bar re-sent with different values is either a correction or a stale push; the history
decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kronos_stream.bars.effects import NEVER
from kronos_stream.market.candle import Bar, Candle


@dataclass(slots=True)
class _Correction:
    candle: Candle
    since: int
    answers: int


class PendingCorrections:
    """At most one correction per bar, by its open; all times are UTC ms."""

    def __init__(self, settle: int, lag: int, answers: int) -> None:
        """Set when the history decides.

        settle: ms until it is requested. lag: ms after which it is up to date. answers: required
        until a bar counts as unchanged.
        """
        self._settle, self._lag, self._answers = settle, lag, answers
        self._corrections: dict[int, _Correction] = {}

    def add(self, candle: Candle, now: int) -> None:
        """Add a candle that differs from the confirmed bar."""
        known = self._corrections.get(candle.time)
        if known is None or not candles_match(known.candle, candle):
            self._corrections[candle.time] = _Correction(candle, now, 0)

    def check(self, candle: Candle, now: int) -> None:
        """Have a doubtful bar compared; a single answer decides."""
        self._corrections[candle.time] = _Correction(candle, now - self._lag, self._answers - 1)

    def discard(self, time: int) -> None:
        self._corrections.pop(time, None)

    def ready(self, now: int, before: int) -> Iterator[int]:
        """Opens below ``before`` of the bars to request now."""
        for time, correction in self._corrections.items():
            if time < before and correction.since + self._settle <= now:
                yield time

    def next_due(self, before: int) -> int:
        """When the next of the bars below ``before`` is to be requested."""
        since = (one.since for time, one in self._corrections.items() if time < before)
        return min(since, default=NEVER) + self._settle

    def resolve(
        self, start: int, end: int, history: Mapping[int, Candle], now: int, bars: Mapping[int, Bar]
    ) -> Iterator[Candle]:
        """Changes of ``bars``, the newest confirmed ones, by the history of start <= open < end.

        Corrections of older bars are dropped.
        """
        oldest = next(iter(bars), end)
        for time, correction in list(self._corrections.items()):
            bar = bars.get(time)
            if time < oldest:
                del self._corrections[time]
            if bar is None or not start <= time < end:
                continue
            correction.answers += 1
            decided = correction.answers >= self._answers and now >= correction.since + self._lag
            # A bar that the history no longer has can only be corrected by the push.
            true = history.get(time, correction.candle if decided else bar.candle)
            changed = not candles_match(true, bar.candle)
            if decided or (changed and candles_match(true, correction.candle)):
                del self._corrections[time]
                if changed:
                    yield true


def candles_match(a: Candle, b: Candle) -> bool:
    """Return whether the values are equal; an unknown amount equals any."""
    return a[:6] == b[:6] and (a.amount == b.amount or a.amount is None or b.amount is None)
