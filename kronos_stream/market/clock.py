"""Clocks of the market's time, injected wherever time is read.

On a live market it is the wall clock's time; in a replay the data advance it, in a simulation the
event loop.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from itertools import count
from typing import Protocol


class Clock(Protocol):
    """Market time in UTC ms, and sleeping in it."""

    def now(self) -> int: ...

    async def sleep(self, seconds: float) -> None: ...

    async def sleep_until(self, moment: int) -> None:
        """Return once ``now() >= moment``; yields to the event loop at least once."""


class SystemClock:
    """The wall clock."""

    def now(self) -> int:
        return time.time_ns() // 1_000_000

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def sleep_until(self, moment: int) -> None:
        await asyncio.sleep(0)
        # The wall clock may be set back meanwhile.
        while (left := moment - self.now()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(left / 1000, 60.0))


class LoopClock:
    """Time of the running event loop, ``speed`` times as fast, starting at ``start`` UTC ms."""

    def __init__(self, start: int, speed: float = 1.0) -> None:
        self._start, self._speed = start, speed
        self._epoch = asyncio.get_running_loop().time()

    def now(self) -> int:
        elapsed = asyncio.get_running_loop().time() - self._epoch
        # A timer may fire a rounding error before the millisecond it was set for.
        return self._start + int(elapsed * self._speed * 1000 + 1e-3)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self._speed)

    async def sleep_until(self, moment: int) -> None:
        await asyncio.sleep(0)
        while (left := moment - self.now()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left / 1000 / self._speed)


class ManualClock:
    """Clock that only :meth:`advance` moves; for tests, and replays at full speed."""

    def __init__(self, start: int) -> None:
        self._now = start
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = count()

    def now(self) -> int:
        return self._now

    def advance(self, moment: int) -> None:
        """Set the time, never back, and wake the sleepers that are due."""
        self._now = max(self._now, moment)
        while self._waiting and self._waiting[0][0] <= self._now:
            future = heapq.heappop(self._waiting)[2]
            if not future.done():
                future.set_result(None)

    async def sleep(self, seconds: float) -> None:
        await self.sleep_until(self._now + round(seconds * 1000))

    async def sleep_until(self, moment: int) -> None:
        if moment <= self._now:
            await asyncio.sleep(0)
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (moment, next(self._order), future))
        await future
