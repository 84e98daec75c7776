"""Each series' due bars in order, until what became of them is told in that order."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from itertools import dropwhile

from kronos_stream.daemon.due import Due, Result
from kronos_stream.market.series import Series


@dataclass(slots=True, eq=False)
class Item:
    """A due bar in its lane."""

    due: Due
    arrived: int
    """UTC ms."""
    taken: bool = False
    """True from the moment a batch takes it."""
    result: Result | None = None
    withdrawn: bool = False
    """Whether it is taken back, whatever becomes of it."""

    @property
    def waiting(self) -> bool:
        return not self.taken and self.result is None


class Lanes:
    """A queue per series. Whatever is decided first, results leave a lane from its head."""

    def __init__(self) -> None:
        self.held = 0
        """Bars in all lanes, and those that have left but are not yet :meth:`told`."""
        self.through = 0
        """Bars that were told, ever."""
        self.decided = asyncio.Event()
        """Set when a result may have come to a head."""
        self._lanes: dict[Series, deque[Item]] = {}
        self._changed: dict[Series, None] = {}

    def add(self, item: Item) -> Item | None:
        """Put a bar behind those of its series; the one before it, if that still waits."""
        lane = self._lanes.setdefault(item.due.series, deque())
        before = lane[-1] if lane else None
        lane.append(item)
        self.held += 1
        return before if before is not None and before.waiting else None

    def oldest_waiting(self, series: Series) -> Item | None:
        return next((item for item in self._lanes.get(series, ()) if item.waiting), None)

    def withdraw(self) -> list[Item]:
        """Take back what no batch has taken, and what is behind it; the former, to be decided."""
        waiting = []
        for lane in self._lanes.values():
            for item in dropwhile(lambda item: not item.waiting, lane):
                if item.waiting:
                    waiting.append(item)
                item.withdrawn = True
        return waiting

    def decide(self, item: Item, result: Result) -> None:
        item.result = result
        self._changed[item.due.series] = None
        self.decided.set()

    def heads(self, most: int) -> list[Item]:
        """Take out items that have nothing undecided before them, at most so many."""
        items: list[Item] = []
        for series in list(self._changed):
            lane = self._lanes[series]
            while lane and lane[0].result is not None:
                if len(items) == most:
                    return items
                items.append(lane.popleft())
            del self._changed[series]
            if not lane:
                del self._lanes[series]
        return items

    def told(self, results: int) -> None:
        """So many results are out of the house."""
        self.held -= results
        self.through += results
