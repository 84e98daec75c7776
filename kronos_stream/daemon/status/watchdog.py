"""Detection of stalled tasks: work is pending, but there is no progress.

Waiting for others is no stall: a silent venue leaves no work, a sink that cannot be reached is
retried, a lost worker is replaced. A task of the daemon that hangs is one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(slots=True)
class StallCheck:
    """Check of one task."""

    name: str
    """The activity, such as ``saving closed bars``."""
    pending: Callable[[], object]
    """True while there is work."""
    progress: Callable[[], object]
    """A value that changes with each piece of work done."""
    timeout: Callable[[], float]
    """Seconds without progress after which the task counts as stalled."""
    _last_progress: object = None
    _last_change: float | None = None

    def check(self, now: float) -> str:
        """Describe the stall; empty if there is none. now: monotonic seconds."""
        progress = self.progress()
        if self._last_change is None or progress != self._last_progress or not self.pending():
            self._last_progress, self._last_change = progress, now
        idle = now - self._last_change
        return f"{self.name}: no progress for {idle:.0f} s" if idle > self.timeout() else ""


class Watchdog:
    """The stall checks of a daemon."""

    def __init__(self) -> None:
        self._checks: tuple[StallCheck, ...] = ()

    def set_checks(self, *groups: Iterable[StallCheck]) -> None:
        """Replace all checks."""
        self._checks = tuple(check for group in groups for check in group)

    def stalled(self, now: float | None = None) -> str:
        """Describe all stalled tasks; empty if there are none. Must be called regularly.

        now: monotonic seconds.
        """
        moment = time.monotonic() if now is None else now
        return "; ".join(filter(None, [check.check(moment) for check in self._checks]))
