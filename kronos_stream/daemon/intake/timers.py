"""Timers of many items, served by one sleeping task."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from itertools import count
from typing import Generic, TypeVar

from kronos_stream.market.clock import Clock

_T = TypeVar("_T")


class TimerQueue(Generic[_T]):
    """Items by due time, UTC ms. An item scheduled several times fires as often."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heap: list[tuple[int, int, _T]] = []
        self._order = count()
        self._asleep_until = 0
        self._earlier = asyncio.Event()

    @property
    def next(self) -> int | None:
        """Earliest due time."""
        return self._heap[0][0] if self._heap else None

    def schedule(self, moment: int, item: _T) -> None:
        heapq.heappush(self._heap, (moment, next(self._order), item))
        if moment < self._asleep_until:
            self._earlier.set()

    def fire(self, callback: Callable[[_T, int], None]) -> None:
        """Call ``callback`` with each item that is due and the current time."""
        now = self._clock.now()
        due = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[2])
        for item in due:
            callback(item, now)

    async def sleep(self, max_ms: int) -> None:
        """Sleep until the earliest due time, at most ``max_ms``."""
        self._asleep_until = self._clock.now() + max_ms
        if self._heap:
            self._asleep_until = min(self._asleep_until, self._heap[0][0])
        time_up = asyncio.ensure_future(self._clock.sleep_until(self._asleep_until))
        earlier = asyncio.ensure_future(self._earlier.wait())
        try:
            await asyncio.wait((time_up, earlier), return_when=asyncio.FIRST_COMPLETED)
            if time_up.done():
                time_up.result()
        finally:
            time_up.cancel()
            earlier.cancel()
            self._earlier.clear()
            self._asleep_until = 0
