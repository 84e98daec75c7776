"""What pushes tell of a venue's time: how far it is, and how late its last words come."""

from __future__ import annotations

_MAX_DELAY_MS = 30_000
"""A last word so much later than the close says nothing about when the next is to be expected."""

_SMOOTHING = 1 / 8
"""Of the newest in the average."""


class PushTiming:
    """Times are UTC ms by our clock, which the venue's may be ahead of or behind."""

    def __init__(self, grace: int, settle: int) -> None:
        """grace: how long after its close, and beyond what is usual, a bar's last word may take.

        settle: how long a push may be overtaken by others.
        """
        self._grace, self._settle = grace, settle
        self.newest = -1
        """Open of the newest bar of which anything was pushed."""
        self.last_push = 0
        """When anything was pushed last."""
        self._since = 0
        self._average_delay = 0.0

    def record_push(self, time: int, received: int) -> None:
        """Something was pushed of the bar that opens at ``time``."""
        self.last_push = received
        if time > self.newest:
            self.newest, self._since = time, received

    def record_delay(self, late: int) -> None:
        """A bar's last word came that long after its close."""
        if late < _MAX_DELAY_MS:
            self._average_delay += (late - self._average_delay) * _SMOOTHING

    def closed_by(self, now: int) -> int:
        """Bars with no later close should have had their last word."""
        later = self.newest if self._since + self._settle <= now else 0
        return max(now - self._grace - int(self._average_delay), later)

    def deadline(self, time: int, close: int) -> int:
        """When a bar should have had its last word, by what is known now."""
        deadline = close + self._grace + int(self._average_delay)
        return min(deadline, self._since + self._settle) if self.newest > time else deadline
