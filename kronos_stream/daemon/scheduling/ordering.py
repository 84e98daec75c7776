"""Queues of pending requests per series, so that results are published in order."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from itertools import dropwhile

from kronos_stream.daemon.requests import ForecastRequest, ForecastResult
from kronos_stream.market.series import Series


@dataclass(slots=True, eq=False)
class Pending:
    """A request whose result is not published yet."""

    request: ForecastRequest
    arrived: int
    """UTC ms."""
    in_batch: bool = False
    """True once a batch has taken it."""
    result: ForecastResult | None = None
    cancelled: bool = False
    """True if its result is to be discarded."""

    @property
    def waiting(self) -> bool:
        return not self.in_batch and self.result is None


class ResultSequencer:
    """A queue per series: results leave it from the front only, whichever is ready first."""

    def __init__(self) -> None:
        self.pending = 0
        """Requests without a published result, including those just popped."""
        self.published = 0
        """Results published so far."""
        self.result_ready = asyncio.Event()
        """Set when a result may have reached the front of a queue."""
        self._queues: dict[Series, deque[Pending]] = {}
        self._changed: dict[Series, None] = {}

    def add(self, item: Pending) -> Pending | None:
        """Append to the queue of its series; return the previous item if that still waits."""
        queue = self._queues.setdefault(item.request.series, deque())
        previous = queue[-1] if queue else None
        queue.append(item)
        self.pending += 1
        return previous if previous is not None and previous.waiting else None

    def oldest_waiting(self, series: Series) -> Pending | None:
        return next((item for item in self._queues.get(series, ()) if item.waiting), None)

    def cancel_waiting(self) -> list[Pending]:
        """Cancel the items that no batch has taken, and those behind them; return the former."""
        waiting = []
        for queue in self._queues.values():
            for item in dropwhile(lambda item: not item.waiting, queue):
                if item.waiting:
                    waiting.append(item)
                item.cancelled = True
        return waiting

    def set_result(self, item: Pending, result: ForecastResult) -> None:
        item.result = result
        self._changed[item.request.series] = None
        self.result_ready.set()

    def pop_ready(self, limit: int) -> list[Pending]:
        """Remove up to ``limit`` items that have a result, as have all before them."""
        items: list[Pending] = []
        for series in list(self._changed):
            queue = self._queues[series]
            while queue and queue[0].result is not None:
                if len(items) == limit:
                    return items
                items.append(queue.popleft())
            del self._changed[series]
            if not queue:
                del self._queues[series]
        return items

    def mark_published(self, count: int) -> None:
        """Count popped items as published."""
        self.pending -= count
        self.published += count
