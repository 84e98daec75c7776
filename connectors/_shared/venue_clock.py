"""What time it is at the venue, by ours, and how well that is known."""

from __future__ import annotations

_MAX_DRIFT = 5e-4
"""How much faster or slower than ours the venue's clock may go; real ones are ten times better."""

_VALID_MS = 60_000
_MAX_JUMP_MS = 1_000
"""Our clock is taken to have been set when it moves so much apart from the machine's uptime."""


class VenueClock:
    """An offset, measured now and then. Times are UTC ms, ``uptime`` any steady clock's seconds."""

    def __init__(self) -> None:
        self.offset = 0
        """How far the venue's clock is ahead of ours, ms."""
        self._uncertainty = 0
        self._measured: tuple[int, float] | None = None

    def update(self, before: int, venue_time: int, after: int, uptime: float) -> None:
        """The venue said ``venue_time`` at some moment of ours from ``before`` to ``after``."""
        self.offset = venue_time - (before + after) // 2
        self._uncertainty = max(0, after - before) // 2 + 1
        self._measured = after, uptime

    def needs_update(self, now: int, uptime: float) -> bool:
        """Whether it must be measured (again)."""
        if self._measured is None:
            return True
        then, then_uptime = self._measured
        passed = now - then
        return (
            not 0 <= passed < _VALID_MS
            or abs(passed - 1000 * (uptime - then_uptime)) > _MAX_JUMP_MS
        )

    def lower_bound(self, now: int) -> int:
        """Certainly this late at the venue: what has closed by then is closed there."""
        age = 0 if self._measured is None else now - self._measured[0]
        return now + self.offset - self._uncertainty - round(_MAX_DRIFT * age)
