"""Which bars make a batch: those of one close together, and whoever waited longest first.

A close is complete when each live series' bar of it has come, or when its time is up; the time
counts from its first bar, since a whole venue may be late. Bars that come later do not wait again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest

from kronos_stream.daemon.requests import ForecastRequest
from kronos_stream.daemon.scheduling.ordering import Pending
from kronos_stream.market.series import Series

_MAX_CLOSES = 256
_MAX_WAIT_MS = 2000


@dataclass(slots=True)
class _CloseGroup:
    """Bars of one close, until all have come or the time is up."""

    deadline: int
    items: list[Pending] = field(default_factory=list)
    complete: bool = False


class Batcher:
    """Waiting bars: some still wait for others of their close, the rest for the worker."""

    def __init__(self, outstanding_bars: Callable[[int], int], batch_wait: float | None) -> None:
        """``awaited`` and ``wait`` are the scheduler's."""
        self.ready: dict[Series, deque[Pending]] = {}
        """Bars that wait for the worker; some may be decided meanwhile."""
        self._outstanding_bars, self._batch_wait = outstanding_bars, batch_wait
        self._closes: dict[int, _CloseGroup] = {}
        self._batch_number = 0
        self._last_batch: dict[Series, int] = {}

    def add(self, item: Pending) -> None:
        until = item.arrived + self._wait_ms(item)
        close = self._closes.get(item.request.close)
        if close is None:
            close = self._closes[item.request.close] = _CloseGroup(until)
            self._evict_closes()
        close.deadline = min(close.deadline, until)
        if close.complete:
            self._make_ready(item)
        else:
            close.items.append(item)

    def next_deadline(self) -> int | None:
        """When the time of the next close is up, UTC ms."""
        return min((c.deadline for c in self._closes.values() if not c.complete), default=None)

    def release(self, now: int, *, force: bool) -> None:
        """Make ready the closes that are complete, and those before them; all in a hurry."""
        gathering = sorted(time for time, close in self._closes.items() if not close.complete)
        while gathering and not (
            force
            or self._closes[gathering[-1]].deadline <= now
            or self._outstanding_bars(gathering[-1]) == 0
        ):
            gathering.pop()
        for time in gathering:
            close = self._closes[time]
            close.complete = True
            for item in close.items:
                self._make_ready(item)
            close.items.clear()

    def discard_resolved(self, expire: Callable[[Pending], None]) -> None:
        """Forget what is decided; ``drop`` may decide the first of each series."""
        for series, items in list(self.ready.items()):
            while items and not items[0].waiting:
                items.popleft()
            if items:
                expire(items[0])
            if not items or not items[0].waiting:
                del self.ready[series]

    def pop_batch(self, limit: int) -> list[Pending]:
        """The next batch: of each series one bar, then second ones, whose turn is longest ago."""
        batch = list(self._fair_order(limit))
        self._batch_number += 1
        for item in batch:
            item.in_batch = True
            self._last_batch[item.request.series] = self._batch_number
        return batch

    def _fair_order(self, limit: int) -> Iterator[Pending]:
        series = sorted(self.ready, key=lambda series: self._last_batch.get(series, 0))
        for items in zip_longest(*(self.ready[one] for one in series)):
            for item in items:
                if item is not None and item.waiting:
                    if not limit:
                        return
                    limit -= 1
                    yield item

    def _make_ready(self, item: Pending) -> None:
        items = self.ready.setdefault(item.request.series, deque())
        items.append(item)
        if len(items) > 1 and items[-2].request.close > item.request.close:
            # Its close was not complete, unlike that of a later bar.
            self.ready[item.request.series] = deque(sorted(items, key=lambda one: one.request[1:3]))

    def _wait_ms(self, item: Pending) -> int:
        if self._batch_wait is not None:
            return round(1000 * self._batch_wait)
        return max(0, min((valid_until(item.request) - item.arrived) // 4, _MAX_WAIT_MS))

    def _evict_closes(self) -> None:
        """Old closes: bars of theirs that still come are treated as a new close's."""
        while len(self._closes) > _MAX_CLOSES and next(iter(self._closes.values())).complete:
            del self._closes[next(iter(self._closes))]


def valid_until(due: ForecastRequest) -> int:
    """Close of the next bar, UTC ms: then a forecast from this one is of no use any more."""
    return due.series.timeframe.after(due.close)
