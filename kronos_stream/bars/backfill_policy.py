"""When a tape may ask the venue's history: one question at a time, with growing pauses."""

from __future__ import annotations

from random import Random

from kronos_stream.bars.effects import NEVER, Fetch

_MIN_PAUSE_MS, _MAX_PAUSE_MS = 1_000, 60_000

_MAX_HOLD_BARS, _MAX_HOLD_MS = 10, 600_000
"""How long bars are held for a history that cannot be had: the shorter of the two."""

_AUDIT_BARS, _MIN_AUDIT_MS, _MAX_AUDIT_MS = 30, 60_000, 600_000
"""After how many bars the newest are asked for again: a change may not have been pushed."""


class BackfillPolicy:
    """The state of a tape's questions; all times are UTC ms."""

    def __init__(self, step: int, random: Random) -> None:
        """step: length of a bar in ms, or about."""
        self.pending: Fetch | None = None
        """What has been asked and not answered."""
        self._random = random
        self._max_hold = min(_MAX_HOLD_BARS * step, _MAX_HOLD_MS)
        self._audit_interval = min(max(_AUDIT_BARS * step, _MIN_AUDIT_MS), _MAX_AUDIT_MS)
        self._tries = self._pause_until = 0
        self._failing_since: int | None = None
        self.next_audit = NEVER
        """When the newest bars are to be asked for again."""

    def allowed(self, now: int) -> bool:
        return self.pending is None and now >= self._pause_until

    def earliest(self, moment: int) -> int:
        """When what is to be asked at ``moment`` can be."""
        return NEVER if self.pending is not None else max(moment, self._pause_until)

    def succeeded(self) -> None:
        self.pending = self._failing_since = None

    def failed(self, now: int, retry_after: float) -> None:
        """No answer; none is to be expected within ``retry_after`` seconds."""
        self.pending = None
        if self._failing_since is None:
            self._failing_since = now
        self.back_off(now)
        self._pause_until += round(retry_after * 1000)

    def back_off(self, now: int) -> None:
        """Later and later, and no two series at the same time."""
        pause = min(_MIN_PAUSE_MS << min(self._tries, 16), _MAX_PAUSE_MS)
        self._tries += 1
        self._pause_until = now + round(pause * self._random.uniform(1, 1.25))

    def reset_backoff(self) -> None:
        """There was progress: no pause, unless the venue is the reason for it."""
        if self._failing_since is None:
            self._tries = self._pause_until = 0

    def hold_deadline(self) -> int:
        """When bars need no longer be held for an answer."""
        return NEVER if self._failing_since is None else self._failing_since + self._max_hold

    def schedule_audit(self, moment: int) -> None:
        self.next_audit = min(self.next_audit, moment)

    def audit_due(self, now: int) -> bool:
        """Whether to ask for the newest bars again; if so, not soon again."""
        first = self.next_audit == NEVER
        if not first and now < self.next_audit:
            return False
        # The first comes early: while the daemon was away, nobody listened to changes.
        share = self._random.uniform(0.1, 0.5) if first else self._random.uniform(0.6, 1)
        self.next_audit = now + round(self._audit_interval * share)
        return not first
