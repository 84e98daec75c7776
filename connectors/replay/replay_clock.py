"""How time comes to pass in a replay: by a clock, or from event to event."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from kronos_stream.market.clock import LoopClock, ManualClock

AdvanceTo = Callable[[int], Awaitable[None]]
"""Returns when the market's time is this, UTC ms."""

WaitUntilIdle = Callable[[], Awaitable[None]]
"""Returns when all that was taken in is dealt with, except what waits for time to pass."""


NextTimer = Callable[[], int | None]
"""When the daemon has something to do even if nothing comes, UTC ms."""


class PacedClock:
    """Stands still until :meth:`begin`; then it is the loop's time, ``speed`` times as fast."""

    def __init__(self, start: int, speed: float = 1.0) -> None:
        self._start, self._speed = start, speed
        self._running: LoopClock | None = None
        self._started = asyncio.Event()

    @property
    def started(self) -> bool:
        return self._running is not None

    def start(self) -> None:
        """Let time pass, from the start on."""
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
    """Time passes by ``clock``, once what precedes the first event has ``settled``."""

    async def reach(moment: int) -> None:
        if not clock.started:
            await wait_until_idle()
            clock.start()
        await clock.sleep_until(moment)

    return reach


def driven_advance(
    clock: ManualClock, wait_until_idle: WaitUntilIdle, next_timer: NextTimer
) -> AdvanceTo:
    """Time leaps to whatever comes next, an event or an alarm, once all before has ``settled``."""

    async def reach(moment: int) -> None:
        await wait_until_idle()
        while (wake := next_timer()) is not None and wake < moment:
            clock.advance(wake)
            await wait_until_idle()
        clock.advance(moment)

    return reach
