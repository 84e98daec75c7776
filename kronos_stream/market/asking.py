"""When a tape may ask the venue's history: one question at a time, with growing pauses."""

from __future__ import annotations

from random import Random

from kronos_stream.market.effects import NEVER, Fetch

_PAUSE_MS, _LONGEST_PAUSE_MS = 1_000, 60_000

_PATIENCE_BARS, _PATIENCE_MS = 10, 600_000
"""How long bars are held for a history that cannot be had: the shorter of the two."""

_AUDIT_BARS, _SHORTEST_AUDIT_MS, _LONGEST_AUDIT_MS = 30, 60_000, 600_000
"""After how many bars the newest are asked for again: a change may not have been pushed."""


class Asking:
    """The state of a tape's questions; all times are UTC ms."""

    def __init__(self, step: int, random: Random) -> None:
        """step: length of a bar in ms, or about."""
        self.open: Fetch | None = None
        """What has been asked and not answered."""
        self._random = random
        self._patience = min(_PATIENCE_BARS * step, _PATIENCE_MS)
        self._every = min(max(_AUDIT_BARS * step, _SHORTEST_AUDIT_MS), _LONGEST_AUDIT_MS)
        self._tries = self._pause_until = 0
        self._failing_since: int | None = None
        self.audit = NEVER
        """When the newest bars are to be asked for again."""

    def allowed(self, now: int) -> bool:
        return self.open is None and now >= self._pause_until

    def earliest(self, moment: int) -> int:
        """When what is to be asked at ``moment`` can be."""
        return NEVER if self.open is not None else max(moment, self._pause_until)

    def answered(self) -> None:
        self.open = self._failing_since = None

    def failed(self, now: int, retry_after: float) -> None:
        """No answer; none is to be expected within ``retry_after`` seconds."""
        self.open = None
        if self._failing_since is None:
            self._failing_since = now
        self.pause(now)
        self._pause_until += round(retry_after * 1000)

    def pause(self, now: int) -> None:
        """Later and later, and no two series at the same time."""
        pause = min(_PAUSE_MS << min(self._tries, 16), _LONGEST_PAUSE_MS)
        self._tries += 1
        self._pause_until = now + round(pause * self._random.uniform(1, 1.25))

    def ease(self) -> None:
        """There was progress: no pause, unless the venue is the reason for it."""
        if self._failing_since is None:
            self._tries = self._pause_until = 0

    def patience_ends(self) -> int:
        """When bars need no longer be held for an answer."""
        return NEVER if self._failing_since is None else self._failing_since + self._patience

    def audit_by(self, moment: int) -> None:
        self.audit = min(self.audit, moment)

    def audit_due(self, now: int) -> bool:
        """Whether to ask for the newest bars again; if so, not soon again."""
        first = self.audit == NEVER
        if not first and now < self.audit:
            return False
        # The first comes early: while the daemon was away, nobody listened to changes.
        share = self._random.uniform(0.1, 0.5) if first else self._random.uniform(0.6, 1)
        self.audit = now + round(self._every * share)
        return not first
