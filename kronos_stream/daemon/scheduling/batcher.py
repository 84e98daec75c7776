"""Formation of batches: bars of one close together, and the longest waiting series first.

A close is complete when the bar of each live series has arrived, or at its deadline. The deadline
counts from the first bar, because a whole venue may be late. Later bars do not wait again.
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
    """Waiting requests of one close."""

    deadline: int
    items: list[Pending] = field(default_factory=list)
    complete: bool = False


class Batcher:
    """Waiting requests: some wait for others of their close, the rest for the worker."""

    def __init__(self, outstanding_bars: Callable[[int], int], batch_wait: float | None) -> None:
        """outstanding_bars, batch_wait: as for the scheduler."""
        self.ready: dict[Series, deque[Pending]] = {}
        """Requests that wait for the worker; some may have a result already."""
        self._outstanding_bars, self._batch_wait = outstanding_bars, batch_wait
        self._closes: dict[int, _CloseGroup] = {}
        self._batch_number = 0
        self._last_batch: dict[Series, int] = {}

    def add(self, item: Pending) -> None:
        deadline = item.arrived + self._wait_ms(item)
        group = self._closes.get(item.request.close)
        if group is None:
            group = self._closes[item.request.close] = _CloseGroup(deadline)
            self._evict_closes()
        group.deadline = min(group.deadline, deadline)
        if group.complete:
            self._make_ready(item)
        else:
            group.items.append(item)

    def next_deadline(self) -> int | None:
        """Earliest deadline of an incomplete close, UTC ms; None if all are complete."""
        return min((g.deadline for g in self._closes.values() if not g.complete), default=None)

    def release(self, now: int, *, force: bool) -> None:
        """Make closes that are complete or past their deadline ready, and all earlier ones.

        force: make all closes ready.
        """
        incomplete = sorted(close for close, group in self._closes.items() if not group.complete)
        while incomplete and not (
            force
            or self._closes[incomplete[-1]].deadline <= now
            or self._outstanding_bars(incomplete[-1]) == 0
        ):
            incomplete.pop()
        for close in incomplete:
            group = self._closes[close]
            group.complete = True
            for item in group.items:
                self._make_ready(item)
            group.items.clear()

    def discard_resolved(self, expire: Callable[[Pending], None]) -> None:
        """Remove requests that have a result; ``expire`` may set that of each series' first."""
        for series, items in list(self.ready.items()):
            while items and not items[0].waiting:
                items.popleft()
            if items:
                expire(items[0])
            if not items or not items[0].waiting:
                del self.ready[series]

    def pop_batch(self, limit: int) -> list[Pending]:
        """Return up to ``limit`` requests: the first of each series, then the second, and so on.

        Series whose last batch was longest ago come first.
        """
        batch = list(self._fair_order(limit))
        self._batch_number += 1
        for item in batch:
            item.in_batch = True
            self._last_batch[item.request.series] = self._batch_number
        return batch

    def _fair_order(self, limit: int) -> Iterator[Pending]:
        series = sorted(self.ready, key=lambda series: self._last_batch.get(series, 0))
        for items in zip_longest(*(self.ready[name] for name in series)):
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
            # The close of a later bar was complete before this one's.
            by_origin = sorted(items, key=lambda item: (item.request.origin, item.request.revision))
            self.ready[item.request.series] = deque(by_origin)

    def _wait_ms(self, item: Pending) -> int:
        if self._batch_wait is not None:
            return round(1000 * self._batch_wait)
        return max(0, min((valid_until(item.request) - item.arrived) // 4, _MAX_WAIT_MS))

    def _evict_closes(self) -> None:
        """Forget old closes; bars that still come for one start a new group."""
        while len(self._closes) > _MAX_CLOSES and next(iter(self._closes.values())).complete:
            del self._closes[next(iter(self._closes))]


def valid_until(request: ForecastRequest) -> int:
    """Close of the next bar, UTC ms, when the next forecast replaces this one."""
    return request.series.timeframe.after(request.close)
