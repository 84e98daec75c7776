"""What stands on a tape, and what waits to: bars in order, each once, and their changes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from kronos_stream.bars.corrections import PendingCorrections, candles_match
from kronos_stream.bars.effects import Append, Confirm, Effect, Fetch, Revise
from kronos_stream.bars.missing import MissingBars
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.grid import Grid

_RECENT_BARS = 96
"""Bars whose exact content is kept, to know a change."""

_MAX_LOOKAHEAD_BARS = 1_000
"""How many bars are looked through for those that are missing."""


class BarLog:
    """The closed bars of one series. Times are UTC ms; what happens is added to ``effects``."""

    def __init__(self, grid: Grid, corrections: PendingCorrections, missing: MissingBars) -> None:
        self.next: int | None = None
        """Open of the bar that comes next; None until a first one is known."""
        self.recent: dict[int, Bar] = {}
        """The newest bars."""
        self.pending: dict[int, Bar] = {}
        """Closed bars that stand behind a hole, or whose close is just ahead by our clock."""
        self.trailing_flat_bars = 0
        """Flat bars at the end."""
        self.corrections, self.missing = corrections, missing
        self._grid = grid

    @property
    def has_gap(self) -> bool:
        """Whether bars are held because those before them are missing."""
        return bool(self.pending) and self.next not in self.pending

    @property
    def anchor(self) -> int | None:
        """The open of some bar, None if none is known."""
        return next(iter(self.pending), None) if self.next is None else self.next

    def restore(self, bars: Sequence[Bar]) -> None:
        """Go on after ``bars``."""
        self.next = self._grid.after(bars[-1].candle.time)
        self.recent = {bar.candle.time: bar for bar in bars[-_RECENT_BARS:]}
        for bar in bars:
            if bar.synthetic and not bar.received:
                self.missing.add(bar)

    def add_pending(self, bar: Bar) -> None:
        """Put a bar where it waits for those before it."""
        time = bar.candle.time
        old = self.pending.get(time)
        if old is None:
            self.pending[time] = bar
        elif old.synthetic:
            self.pending[time] = bar._replace(revision=old.revision + 1)
        elif not candles_match(old.candle, bar.candle):
            self.corrections.add(bar.candle, bar.received)

    def append_ready(self, now: int, effects: list[Effect]) -> None:
        """Append what waits no longer."""
        while self.next is not None and self.next in self.pending:
            close = self._grid.after(self.next)
            if close > now:
                return
            self._append(self.pending.pop(self.next), close, effects)

    def append_flat(self, time: int, close: int, received: int, effects: list[Effect]) -> None:
        """Put a bar without trades in the place of the next; owed if nobody said so."""
        self.missing.resolve(time)
        if not self.recent:  # what no bar stands before is not missed
            self.next = close
            return
        last = self.recent[next(reversed(self.recent))].candle
        bar = _flat(time, last, received)
        self._append(bar, close, effects)
        if not received:
            self.missing.add(bar)

    def compare(self, candle: Candle, now: int, effects: list[Effect]) -> None:
        """Take in a word on a bar that stands here already, if it is a new one."""
        bar = self._find(candle.time)
        if bar is None:
            return  # older than the memory, where a change cannot be told from a stale push
        if bar.synthetic:
            self._revise(candle, now, effects)
        elif not candles_match(bar.candle, candle):
            self.corrections.add(candle, now)

    def flag_mismatch(self, candle: Candle, now: int) -> None:
        """Take in a push that is no last word on a bar that stands here: have it compared."""
        bar = self._find(candle.time)
        if bar is not None and not candles_match(bar.candle, candle):
            self.corrections.add(bar.candle, now)

    def resolve_corrections(
        self, request: Fetch, history: Mapping[int, Candle], now: int, effects: list[Effect]
    ) -> None:
        """Change what is in doubt, as an answer of the history has it."""
        for changed in self.corrections.resolve(*request, history, now, self.recent):
            self._revise(changed, now, effects)

    def confirm_placeholders(
        self, request: Fetch, history: Collection[int], now: int, effects: list[Effect]
    ) -> None:
        """Confirm made-up bars that the history does not have either."""
        for bar in self.missing.confirm_placeholders(request, history, now):
            if bar.candle.time in self.recent:
                self.recent[bar.candle.time] = bar
            effects.append(Confirm(bar))

    def missing_opens(self, end: int) -> Iterator[int]:
        """The next bars, as far as they close by ``end`` and are not held."""
        time = self.next
        for _ in range(_MAX_LOOKAHEAD_BARS):
            if time is None or (close := self._grid.after(time)) > end:
                return
            if time not in self.pending:
                yield time
            time = close

    def newest(self, bars: int) -> int | None:
        """Open of the first of the newest ``bars``, None if none is here."""
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
        newest = self._grid.after(time) == self.next
        if newest:
            self.trailing_flat_bars = 0
        effects.append(Revise(bar, newest))

    def _find(self, time: int) -> Bar | None:
        return self.recent.get(time) or self.missing.get(time)


def _flat(time: int, last: Candle, received: int) -> Bar:
    """The bar after ``last`` if nothing is traded."""
    price = last.close
    amount = None if last.amount is None else 0.0
    candle = Candle(time, price, price, price, price, 0.0, amount)
    return Bar(candle, synthetic=True, received=received)
