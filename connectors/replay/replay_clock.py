"""Time of a replay: by a clock, or from event to event."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from kronos_stream.market.clock import LoopClock, ManualClock

AdvanceTo = Callable[[int], Awaitable[None]]
"""Wait until the market's time is this, UTC ms."""

WaitUntilIdle = Callable[[], Awaitable[None]]
"""Wait until all updates are processed, except for work that waits for a later time."""

NextTimer = Callable[[], int | None]
"""Time of the daemon's next timer, UTC ms."""


class PacedClock:
    """Clock that stands still until :meth:`start`, then runs at ``speed`` times the loop's."""

    def __init__(self, start: int, speed: float = 1.0) -> None:
        self._start, self._speed = start, speed
        self._running: LoopClock | None = None
        self._started = asyncio.Event()

    @property
    def started(self) -> bool:
        return self._running is not None

    def start(self) -> None:
        """Start the clock."""
        self._running = LoopClock(self._start, self._speed)
        self._started.set()

    def now(self) -> int:
        return self._start if self._running is None else self._running.now()

    async def sleep(self, seconds: float) -> None:
        await self.sleep_until(self.now() + round(seconds * 1000))

    async def sleep_until(self, moment: int) -> None:
        await asyncio.sleep(0)
        while self.now() < moment:
            if self._running is None:
                await self._started.wait()
            else:
                await self._running.sleep_until(moment)


def paced_advance(clock: PacedClock, wait_until_idle: WaitUntilIdle) -> AdvanceTo:
    """Wait for ``clock``, which starts when the work before the first event is done."""

    async def advance_to(moment: int) -> None:
        if not clock.started:
            await wait_until_idle()
            clock.start()
        await clock.sleep_until(moment)

    return advance_to


def driven_advance(
    clock: ManualClock, wait_until_idle: WaitUntilIdle, next_timer: NextTimer
) -> AdvanceTo:
    """Advance ``clock`` to the next event or timer once all earlier work is done."""

    async def advance_to(moment: int) -> None:
        await wait_until_idle()
        while (timer := next_timer()) is not None and timer < moment:
            clock.advance(timer)
            await wait_until_idle()
        clock.advance(moment)

    return advance_to
