"""Which bars make a batch: those of one close together, and whoever waited longest first.

A close is complete when each live series' bar of it has come, or when its time is up; the time
counts from its first bar, since a whole venue may be late. Bars that come later do not wait again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest

from kronos_stream.daemon.due import Due
from kronos_stream.daemon.lanes import Item
from kronos_stream.market.series import Series

_CLOSES_KNOWN = 256
_LONGEST_WAIT_MS = 2000


@dataclass(slots=True)
class _Close:
    """Bars of one close, until all have come or the time is up."""

    until: int
    items: list[Item] = field(default_factory=list)
    complete: bool = False


class Gathering:
    """Waiting bars: some still wait for others of their close, the rest for the worker."""

    def __init__(self, awaited: Callable[[int], int], wait: float | None) -> None:
        """``awaited`` and ``wait`` are the scheduler's."""
        self.ready: dict[Series, deque[Item]] = {}
        """Bars that wait for the worker; some may be decided meanwhile."""
        self._awaited, self._wait = awaited, wait
        self._closes: dict[int, _Close] = {}
        self._turn = 0
        self._last_turn: dict[Series, int] = {}

    def add(self, item: Item) -> None:
        until = item.arrived + self._patience_ms(item)
        close = self._closes.get(item.due.close)
        if close is None:
            close = self._closes[item.due.close] = _Close(until)
            self._forget()
        close.until = min(close.until, until)
        if close.complete:
            self._make_ready(item)
        else:
            close.items.append(item)

    def next_end(self) -> int | None:
        """When the time of the next close is up, UTC ms."""
        return min((c.until for c in self._closes.values() if not c.complete), default=None)

    def release(self, now: int, *, hurry: bool) -> None:
        """Make ready the closes that are complete, and those before them; all in a hurry."""
        gathering = sorted(time for time, close in self._closes.items() if not close.complete)
        while gathering and not (
            hurry or self._closes[gathering[-1]].until <= now or self._awaited(gathering[-1]) == 0
        ):
            gathering.pop()
        for time in gathering:
            close = self._closes[time]
            close.complete = True
            for item in close.items:
                self._make_ready(item)
            close.items.clear()

    def tidy(self, drop: Callable[[Item], None]) -> None:
        """Forget what is decided; ``drop`` may decide the first of each series."""
        for series, items in list(self.ready.items()):
            while items and not items[0].waiting:
                items.popleft()
            if items:
                drop(items[0])
            if not items or not items[0].waiting:
                del self.ready[series]

    def take(self, room: int) -> list[Item]:
        """The next batch: of each series one bar, then second ones, whose turn is longest ago."""
        batch = list(self._in_turn(room))
        self._turn += 1
        for item in batch:
            item.taken = True
            self._last_turn[item.due.series] = self._turn
        return batch

    def _in_turn(self, room: int) -> Iterator[Item]:
        series = sorted(self.ready, key=lambda series: self._last_turn.get(series, 0))
        for items in zip_longest(*(self.ready[one] for one in series)):
            for item in items:
                if item is not None and item.waiting:
                    if not room:
                        return
                    room -= 1
                    yield item

    def _make_ready(self, item: Item) -> None:
        items = self.ready.setdefault(item.due.series, deque())
        items.append(item)
        if len(items) > 1 and items[-2].due.close > item.due.close:
            # Its close was not complete, unlike that of a later bar.
            self.ready[item.due.series] = deque(sorted(items, key=lambda one: one.due[1:3]))

    def _patience_ms(self, item: Item) -> int:
        if self._wait is not None:
            return round(1000 * self._wait)
        return max(0, min((valid_until(item.due) - item.arrived) // 4, _LONGEST_WAIT_MS))

    def _forget(self) -> None:
        """Old closes: bars of theirs that still come are treated as a new close's."""
        while len(self._closes) > _CLOSES_KNOWN and next(iter(self._closes.values())).complete:
            del self._closes[next(iter(self._closes))]


def valid_until(due: Due) -> int:
    """Close of the next bar, UTC ms: then a forecast from this one is of no use any more."""
    return due.series.timeframe.after(due.close)
