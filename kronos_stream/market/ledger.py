"""What stands on a tape, and what waits to: bars in order, each once, and their changes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.claims import Claims, same
from kronos_stream.market.debts import Debts
from kronos_stream.market.effects import Append, Confirm, Effect, Fetch, Revise
from kronos_stream.market.grid import Grid

_MEMORY = 96
"""Bars whose exact content is kept, to know a change."""

_AHEAD = 1_000
"""How many bars are looked through for those that are missing."""


class Ledger:
    """The closed bars of one series. Times are UTC ms; what happens is added to ``effects``."""

    def __init__(self, grid: Grid, claims: Claims, debts: Debts) -> None:
        self.next: int | None = None
        """Open of the bar that comes next; None until a first one is known."""
        self.recent: dict[int, Bar] = {}
        """The newest bars."""
        self.held: dict[int, Bar] = {}
        """Closed bars that stand behind a hole, or whose close is just ahead by our clock."""
        self.quiet = 0
        """Flat bars at the end."""
        self.claims, self.debts = claims, debts
        self._grid = grid

    @property
    def holed(self) -> bool:
        """Whether bars are held because those before them are missing."""
        return bool(self.held) and self.next not in self.held

    @property
    def anchor(self) -> int | None:
        """The open of some bar, None if none is known."""
        return next(iter(self.held), None) if self.next is None else self.next

    def restore(self, bars: Sequence[Bar]) -> None:
        """Go on after ``bars``."""
        self.next = self._grid.after(bars[-1].candle.time)
        self.recent = {bar.candle.time: bar for bar in bars[-_MEMORY:]}
        for bar in bars:
            if bar.synthetic and not bar.received:
                self.debts.owe(bar)

    def hold(self, bar: Bar) -> None:
        """Put a bar where it waits for those before it."""
        time = bar.candle.time
        old = self.held.get(time)
        if old is None:
            self.held[time] = bar
        elif old.synthetic:
            self.held[time] = bar._replace(revision=old.revision + 1)
        elif not same(old.candle, bar.candle):
            self.claims.put(bar.candle, bar.received)

    def drain(self, now: int, effects: list[Effect]) -> None:
        """Append what waits no longer."""
        while self.next is not None and self.next in self.held:
            close = self._grid.after(self.next)
            if close > now:
                return
            self._append(self.held.pop(self.next), close, effects)

    def append_flat(self, time: int, close: int, received: int, effects: list[Effect]) -> None:
        """Put a bar without trades in the place of the next; owed if nobody said so."""
        self.debts.pay(time)
        if not self.recent:  # what no bar stands before is not missed
            self.next = close
            return
        last = self.recent[next(reversed(self.recent))].candle
        bar = _flat(time, last, received)
        self._append(bar, close, effects)
        if not received:
            self.debts.owe(bar)

    def compare(self, candle: Candle, now: int, effects: list[Effect]) -> None:
        """Take in a word on a bar that stands here already, if it is a new one."""
        bar = self._find(candle.time)
        if bar is None:
            return  # older than the memory, where a change cannot be told from a stale push
        if bar.synthetic:
            self._revise(candle, now, effects)
        elif not same(bar.candle, candle):
            self.claims.put(candle, now)

    def doubt(self, candle: Candle, now: int) -> None:
        """Take in a push that is no last word on a bar that stands here: have it compared."""
        bar = self._find(candle.time)
        if bar is not None and not same(bar.candle, candle):
            self.claims.put(bar.candle, now)

    def judge(
        self, asked: Fetch, given: Mapping[int, Candle], now: int, effects: list[Effect]
    ) -> None:
        """Change what is in doubt, as an answer of the history has it."""
        for changed in self.claims.judge(*asked, given, now, self.recent):
            self._revise(changed, now, effects)

    def settle(self, asked: Fetch, given: Collection[int], now: int, effects: list[Effect]) -> None:
        """Confirm made-up bars that the history does not have either."""
        for bar in self.debts.settle(asked, given, now):
            if bar.candle.time in self.recent:
                self.recent[bar.candle.time] = bar
            effects.append(Confirm(bar))

    def lacking(self, end: int) -> Iterator[int]:
        """The next bars, as far as they close by ``end`` and are not held."""
        time = self.next
        for _ in range(_AHEAD):
            if time is None or (close := self._grid.after(time)) > end:
                return
            if time not in self.held:
                yield time
            time = close

    def newest(self, bars: int) -> int | None:
        """Open of the first of the newest ``bars``, None if none is here."""
        return next(iter(list(self.recent)[-bars:]), None)

    def _append(self, bar: Bar, close: int, effects: list[Effect]) -> None:
        time = bar.candle.time
        self.recent[time] = bar
        if len(self.recent) > _MEMORY:
            del self.recent[next(iter(self.recent))]
        self.next = close
        self.debts.pay(time)
        self.quiet = self.quiet + 1 if bar.synthetic else 0
        effects.append(Append(bar))

    def _revise(self, candle: Candle, now: int, effects: list[Effect]) -> None:
        time = candle.time
        old = self._find(time)
        bar = Bar(candle, 1 if old is None else old.revision + 1, received=now)
        if time in self.recent:
            self.recent[time] = bar
        self.debts.pay(time)
        self.claims.drop(time)
        newest = self._grid.after(time) == self.next
        if newest:
            self.quiet = 0
        effects.append(Revise(bar, newest))

    def _find(self, time: int) -> Bar | None:
        return self.recent.get(time) or self.debts.get(time)


def _flat(time: int, last: Candle, received: int) -> Bar:
    """The bar after ``last`` if nothing is traded."""
    price = last.close
    amount = None if last.amount is None else 0.0
    candle = Candle(time, price, price, price, price, 0.0, amount)
    return Bar(candle, synthetic=True, received=received)
