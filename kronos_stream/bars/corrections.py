"""What speaks against bars that are on the tape already.

A closed bar that is told again with other values may have been changed by the venue, or the word
is an old one that comes late: pushes do. So nothing is changed before the venue's history has been
asked, and its word is the last.
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
    """At most one claim per bar, by its open; all times are UTC ms."""

    def __init__(self, settle: int, lag: int, answers: int) -> None:
        """How the venue's history is asked.

        settle: ms until it is asked. lag: ms after which it is up to date. answers: how often it
        must have spoken, before it is believed that nothing changed.
        """
        self._settle, self._lag, self._answers = settle, lag, answers
        self._corrections: dict[int, _Correction] = {}

    def add(self, candle: Candle, now: int) -> None:
        """Somebody says that this is the bar."""
        claim = self._corrections.get(candle.time)
        if claim is None or not candles_match(claim.candle, candle):
            self._corrections[candle.time] = _Correction(candle, now, 0)

    def check(self, candle: Candle, now: int) -> None:
        """Have a bar compared that is doubtful by itself; one answer will do."""
        self._corrections[candle.time] = _Correction(candle, now - self._lag, self._answers - 1)

    def discard(self, time: int) -> None:
        self._corrections.pop(time, None)

    def ready(self, now: int, before: int) -> Iterator[int]:
        """Bars that open before ``before`` and are to be asked for now."""
        for time, claim in self._corrections.items():
            if time < before and claim.since + self._settle <= now:
                yield time

    def next_due(self, before: int) -> int:
        """When the next of these is to be asked for."""
        if not self._corrections:
            return NEVER
        times = (claim.since for time, claim in self._corrections.items() if time < before)
        return min(times, default=NEVER) + self._settle

    def resolve(
        self, start: int, end: int, history: Mapping[int, Candle], now: int, bars: Mapping[int, Bar]
    ) -> Iterator[Candle]:
        """What the answer ``given`` for opens from ``start`` to ``end`` changes in ``bars``.

        bars: the newest on the tape; a claim against an older one is dropped.
        """
        oldest = next(iter(bars), end)
        for time, claim in list(self._corrections.items()):
            bar = bars.get(time)
            if time < oldest:
                del self._corrections[time]
            if bar is None or not start <= time < end:
                continue
            claim.answers += 1
            decided = claim.answers >= self._answers and now >= claim.since + self._lag
            # Where history does not reach, the claim is all there is.
            said = history.get(time, claim.candle if decided else bar.candle)
            changed = not candles_match(said, bar.candle)
            if decided or (changed and candles_match(said, claim.candle)):
                del self._corrections[time]
                if changed:
                    yield said


def candles_match(a: Candle, b: Candle) -> bool:
    """Whether they are equal as far as both say."""
    return a[:6] == b[:6] and (a.amount == b.amount or a.amount is None or b.amount is None)
