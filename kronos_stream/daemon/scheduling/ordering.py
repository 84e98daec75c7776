"""Each series' due bars in order, until what became of them is told in that order."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from itertools import dropwhile

from kronos_stream.daemon.requests import ForecastRequest, ForecastResult
from kronos_stream.market.series import Series


@dataclass(slots=True, eq=False)
class Pending:
    """A due bar in its lane."""

    request: ForecastRequest
    arrived: int
    """UTC ms."""
    in_batch: bool = False
    """True from the moment a batch takes it."""
    result: ForecastResult | None = None
    cancelled: bool = False
    """Whether it is taken back, whatever becomes of it."""

    @property
    def waiting(self) -> bool:
        return not self.in_batch and self.result is None


class ResultSequencer:
    """A queue per series. Whatever is decided first, results leave a lane from its head."""

    def __init__(self) -> None:
        self.pending = 0
        """Bars in all lanes, and those that have left but are not yet :meth:`told`."""
        self.published = 0
        """Bars that were told, ever."""
        self.result_ready = asyncio.Event()
        """Set when a result may have come to a head."""
        self._queues: dict[Series, deque[Pending]] = {}
        self._changed: dict[Series, None] = {}

    def add(self, item: Pending) -> Pending | None:
        """Put a bar behind those of its series; the one before it, if that still waits."""
        lane = self._queues.setdefault(item.request.series, deque())
        before = lane[-1] if lane else None
        lane.append(item)
        self.pending += 1
        return before if before is not None and before.waiting else None

    def oldest_waiting(self, series: Series) -> Pending | None:
        return next((item for item in self._queues.get(series, ()) if item.waiting), None)

    def cancel_waiting(self) -> list[Pending]:
        """Take back what no batch has taken, and what is behind it; the former, to be decided."""
        waiting = []
        for lane in self._queues.values():
            for item in dropwhile(lambda item: not item.waiting, lane):
                if item.waiting:
                    waiting.append(item)
                item.cancelled = True
        return waiting

    def set_result(self, item: Pending, result: ForecastResult) -> None:
        item.result = result
        self._changed[item.request.series] = None
        self.result_ready.set()

    def pop_ready(self, limit: int) -> list[Pending]:
        """Take out items that have nothing undecided before them, at most so many."""
        items: list[Pending] = []
        for series in list(self._changed):
            lane = self._queues[series]
            while lane and lane[0].result is not None:
                if len(items) == limit:
                    return items
                items.append(lane.popleft())
            del self._changed[series]
            if not lane:
                del self._queues[series]
        return items

    def mark_published(self, count: int) -> None:
        """So many results are out of the house."""
        self.pending -= count
        self.published += count
