"""An event loop whose time leaps: hours of waiting in seconds, with real sockets.

While anything can be done, it is done; only when the loop would sleep does its time jump to the
next timer. Sockets between tasks of one loop work as ever: what was sent on the loopback is there
to be read before anybody sleeps. Work in threads (``run_in_executor``) holds the time still until
it has finished, and so does :meth:`VirtualLoop.holding` for what another process does.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, TypeVar, TypeVarTuple

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

_SETTLE_SECONDS = 0.0001
"""Real time given to the kernel to hand over what is on its way, before time leaps."""


class _TimeSkippingSelector(selectors.DefaultSelector):
    """Never sleeps through a timer: polls, then moves the loop's time by what it should sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.elapsed = 0.0
        self.holds = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        if self.holds:
            return super().select(0.05)
        if ready := super().select(0):
            return ready
        time.sleep(_SETTLE_SECONDS)
        ready = super().select(0)
        if not ready:
            self.elapsed += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """``asyncio.SelectorEventLoop`` in virtual seconds that begin at 0."""

    def __init__(self) -> None:
        self._time_selector = _TimeSkippingSelector()
        super().__init__(self._time_selector)

    def time(self) -> float:
        return self._time_selector.elapsed

    @contextmanager
    def hold_time(self) -> Iterator[None]:
        """Let no time pass while the block runs."""
        self._time_selector.holds += 1
        try:
            yield
        finally:
            self._time_selector.holds -= 1

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*_Ts], _T], *args: *_Ts
    ) -> asyncio.Future[_T]:
        future = super().run_in_executor(executor, func, *args)
        self._time_selector.holds += 1
        future.add_done_callback(self._release)
        return future

    def _release(self, _: object) -> None:
        self._time_selector.holds -= 1


def run_virtual(main: Coroutine[Any, Any, _T]) -> _T:
    """``asyncio.run`` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
