"""Timing of pushes: the newest bar pushed, and the usual delay of closing pushes."""

from __future__ import annotations

_MAX_DELAY_MS = 30_000
"""A closing push later than this does not count for the average."""

_SMOOTHING = 1 / 8
"""Weight of the newest delay in the average."""


class PushTiming:
    """Times are UTC ms by the local clock; the venue's may be ahead or behind."""

    def __init__(self, grace: int, settle: int) -> None:
        """grace: ms after close and average delay until a closing push is overdue.

        settle: ms within which pushes may overtake each other.
        """
        self._grace, self._settle = grace, settle
        self.newest = -1
        """Open of the newest bar pushed so far."""
        self.last_push = 0
        """Time of the last push."""
        self._newest_since = 0
        self._average_delay = 0.0

    def record_push(self, time: int, received: int) -> None:
        """Record a push of the bar that opens at ``time``."""
        self.last_push = received
        if time > self.newest:
            self.newest, self._newest_since = time, received

    def record_delay(self, delay: int) -> None:
        """Record how long after its close a bar's closing push came."""
        if delay < _MAX_DELAY_MS:
            self._average_delay += (delay - self._average_delay) * _SMOOTHING

    def closed_by(self, now: int) -> int:
        """Latest close whose closing push should have arrived by ``now``."""
        later = self.newest if self._newest_since + self._settle <= now else 0
        return max(now - self._grace - int(self._average_delay), later)

    def deadline(self, time: int, close: int) -> int:
        """Moment when the closing push of the bar that opens at ``time`` is overdue."""
        deadline = close + self._grace + int(self._average_delay)
        return min(deadline, self._newest_since + self._settle) if self.newest > time else deadline
