"""Backfill policy: one request at a time, with growing pauses, and regular audits."""

from __future__ import annotations

from random import Random

from kronos_stream.backoff import Backoff
from kronos_stream.bars.effects import NEVER, Fetch

_MIN_PAUSE_MS, _MAX_PAUSE_MS = 1_000, 60_000

_MAX_HOLD_BARS, _MAX_HOLD_MS = 10, 600_000
"""Limits of holding bars while the history cannot be reached; the shorter one applies."""

_AUDIT_BARS, _MIN_AUDIT_MS, _MAX_AUDIT_MS = 30, 60_000, 600_000
"""Interval of audits, in bars and its bounds: a correction may not have been pushed."""


class BackfillPolicy:
    """Schedule of one series' requests; all times are UTC ms."""

    def __init__(self, step: int, random: Random) -> None:
        """step: length of a bar in ms, at least."""
        self.pending: Fetch | None = None
        """The request that is not answered yet."""
        self._random = random
        self._backoff = Backoff(
            random, initial=_MIN_PAUSE_MS, maximum=_MAX_PAUSE_MS, jitter=(1, 1.25)
        )
        self._max_hold = min(_MAX_HOLD_BARS * step, _MAX_HOLD_MS)
        self._audit_interval = min(max(_AUDIT_BARS * step, _MIN_AUDIT_MS), _MAX_AUDIT_MS)
        self._pause_until = 0
        self._failing_since: int | None = None
        self.next_audit = NEVER
        """Time of the next audit, which requests the newest bars again."""

    def allowed(self, now: int) -> bool:
        return self.pending is None and now >= self._pause_until

    def earliest(self, moment: int) -> int:
        """Earliest time of a request that is due at ``moment``."""
        return NEVER if self.pending is not None else max(moment, self._pause_until)

    def succeeded(self) -> None:
        self.pending = self._failing_since = None

    def failed(self, now: int, retry_after: float) -> None:
        """Record a failed request; the next comes ``retry_after`` seconds later than usual."""
        self.pending = None
        if self._failing_since is None:
            self._failing_since = now
        self.back_off(now)
        self._pause_until += round(retry_after * 1000)

    def back_off(self, now: int) -> None:
        self._pause_until = now + round(self._backoff.next_delay())

    def reset_backoff(self) -> None:
        """End the pause after progress, unless the venue is failing."""
        if self._failing_since is None:
            self._backoff.reset()
            self._pause_until = 0

    def hold_deadline(self) -> int:
        """Time from which bars are no longer held for an answer."""
        return NEVER if self._failing_since is None else self._failing_since + self._max_hold

    def schedule_audit(self, moment: int) -> None:
        self.next_audit = min(self.next_audit, moment)

    def audit_due(self, now: int) -> bool:
        """Return whether to request the newest bars again; if so, schedule the next audit."""
        first = self.next_audit == NEVER
        if not first and now < self.next_audit:
            return False
        # The first comes early: no corrections were received while the daemon was down.
        share = self._random.uniform(0.1, 0.5) if first else self._random.uniform(0.6, 1)
        self.next_audit = now + round(self._audit_interval * share)
        return not first
