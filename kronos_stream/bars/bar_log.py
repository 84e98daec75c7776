"""Confirmed bars of a series, and closed bars waiting for earlier ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from kronos_stream.bars.corrections import PendingCorrections, candles_match
from kronos_stream.bars.effects import Append, Confirm, Effect, Fetch, Revise
from kronos_stream.bars.missing import MissingBars
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.timeframe import Timeframe

_RECENT_BARS = 96
"""Confirmed bars that are kept, to detect changes."""

_MAX_LOOKAHEAD_BARS = 1_000
"""Bars searched for missing ones at a time."""


class BarLog:
    """Closed bars of one series. Times are UTC ms; changes are added to ``effects``."""

    def __init__(
        self, timeframe: Timeframe, corrections: PendingCorrections, missing: MissingBars
    ) -> None:
        self.next: int | None = None
        """Open of the next bar to confirm; None until a first one is known."""
        self.recent: dict[int, Bar] = {}
        """The newest confirmed bars, by open."""
        self.pending: dict[int, Bar] = {}
        """Closed bars behind a gap, or whose close is just ahead by the local clock."""
        self.trailing_flat_bars = 0
        """Number of synthetic bars at the end."""
        self.corrections, self.missing = corrections, missing
        self._timeframe = timeframe

    @property
    def has_gap(self) -> bool:
        """True if bars wait because earlier ones are missing."""
        return bool(self.pending) and self.next not in self.pending

    @property
    def anchor(self) -> int | None:
        """Open of any known bar, None if there is none."""
        return next(iter(self.pending), None) if self.next is None else self.next

    def restore(self, bars: Sequence[Bar]) -> None:
        """Continue after ``bars``."""
        self.next = self._timeframe.after(bars[-1].candle.time)
        self.recent = {bar.candle.time: bar for bar in bars[-_RECENT_BARS:]}
        for bar in bars:
            if bar.synthetic and not bar.received:
                self.missing.add(bar)

    def add_pending(self, bar: Bar) -> None:
        """Add a closed bar that is not confirmed yet."""
        time = bar.candle.time
        old = self.pending.get(time)
        if old is None:
            self.pending[time] = bar
        elif old.synthetic:
            self.pending[time] = bar._replace(revision=old.revision + 1)
        elif not candles_match(old.candle, bar.candle):
            self.corrections.add(bar.candle, bar.received)

    def append_ready(self, now: int, effects: list[Effect]) -> None:
        """Confirm pending bars, up to the first gap and to those that have closed by ``now``."""
        while self.next is not None and self.next in self.pending:
            close = self._timeframe.after(self.next)
            if close > now:
                return
            self._append(self.pending.pop(self.next), close, effects)

    def append_flat(self, time: int, close: int, received: int, effects: list[Effect]) -> None:
        """Confirm a bar without trades; a placeholder if ``received`` is 0."""
        self.missing.resolve(time)
        if not self.recent:  # nothing to continue from: the series starts later
            self.next = close
            return
        last = self.recent[next(reversed(self.recent))].candle
        bar = _flat(time, last, received)
        self._append(bar, close, effects)
        if not received:
            self.missing.add(bar)

    def compare(self, candle: Candle, now: int, effects: list[Effect]) -> None:
        """Compare a closed candle with the confirmed bar; a difference becomes a correction."""
        bar = self._find(candle.time)
        if bar is None:
            return  # too old to distinguish a correction from a stale push
        if bar.synthetic:
            self._revise(candle, now, effects)
        elif not candles_match(bar.candle, candle):
            self.corrections.add(candle, now)

    def flag_mismatch(self, candle: Candle, now: int) -> None:
        """Have the history checked if an open candle differs from the confirmed bar."""
        bar = self._find(candle.time)
        if bar is not None and not candles_match(bar.candle, candle):
            self.corrections.add(bar.candle, now)

    def resolve_corrections(
        self, request: Fetch, history: Mapping[int, Candle], now: int, effects: list[Effect]
    ) -> None:
        """Apply the corrections that an answer of the history decides."""
        for changed in self.corrections.resolve(*request, history, now, self.recent):
            self._revise(changed, now, effects)

    def confirm_placeholders(
        self, request: Fetch, history: Collection[int], now: int, effects: list[Effect]
    ) -> None:
        """Confirm placeholders whose bars the history does not have either."""
        for bar in self.missing.confirm_placeholders(request, history, now):
            if bar.candle.time in self.recent:
                self.recent[bar.candle.time] = bar
            effects.append(Confirm(bar))

    def missing_opens(self, end: int) -> Iterator[int]:
        """Opens of the next bars that close by ``end`` and are not pending."""
        time = self.next
        for _ in range(_MAX_LOOKAHEAD_BARS):
            if time is None or (close := self._timeframe.after(time)) > end:
                return
            if time not in self.pending:
                yield time
            time = close

    def newest(self, bars: int) -> int | None:
        """Open of the first of the newest ``bars`` bars, None if there is none."""
        return next(iter(list(self.recent)[-bars:]), None)

    def _append(self, bar: Bar, close: int, effects: list[Effect]) -> None:
        time = bar.candle.time
        self.recent[time] = bar
        if len(self.recent) > _RECENT_BARS:
            del self.recent[next(iter(self.recent))]
        self.next = close
        self.missing.resolve(time)
        self.trailing_flat_bars = self.trailing_flat_bars + 1 if bar.synthetic else 0
        effects.append(Append(bar))

    def _revise(self, candle: Candle, now: int, effects: list[Effect]) -> None:
        time = candle.time
        old = self._find(time)
        bar = Bar(candle, 1 if old is None else old.revision + 1, received=now)
        if time in self.recent:
            self.recent[time] = bar
        self.missing.resolve(time)
        self.corrections.discard(time)
        newest = self._timeframe.after(time) == self.next
        if newest:
            self.trailing_flat_bars = 0
        effects.append(Revise(bar, newest))

    def _find(self, time: int) -> Bar | None:
        return self.recent.get(time) or self.missing.get(time)


def _flat(time: int, last: Candle, received: int) -> Bar:
    """Bar after ``last`` without trades."""
    price = last.close
    amount = None if last.amount is None else 0.0
    candle = Candle(time, price, price, price, price, 0.0, amount)
    return Bar(candle, synthetic=True, received=received)
