"""An event loop in virtual time: it skips waiting times, with real sockets.

When nothing is left to run, the time of the loop jumps to the next timer. Sockets between tasks of
one loop work as usual: data sent on the loopback interface arrive before the time jumps. The time
stands still while work in threads (``run_in_executor``) runs, and during
:meth:`VirtualLoop.hold_time`, for work of other processes.
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
"""Real time for the kernel to deliver data in flight before the time jumps."""


class _TimeSkippingSelector(selectors.DefaultSelector):
    """Selector that polls, and adds the time that it should sleep to the loop's time."""

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
    """``asyncio.SelectorEventLoop`` in virtual seconds, starting at 0."""

    def __init__(self) -> None:
        self._time_selector = _TimeSkippingSelector()
        super().__init__(self._time_selector)

    def time(self) -> float:
        return self._time_selector.elapsed

    @contextmanager
    def hold_time(self) -> Iterator[None]:
        """Stop the virtual time during the block."""
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
    """Run a coroutine in virtual time, like ``asyncio.run``."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
