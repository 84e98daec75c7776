"""How long to wait before the next try at connecting."""

from __future__ import annotations

from random import Random

_INITIAL_SECONDS, _MAX_SECONDS = 0.25, 10.0


class Backoff:
    """Pauses that double up to a point, and never in step with those of others."""

    def __init__(self, random: Random) -> None:
        self.short_lived = 0
        """Connections in a row that were made and soon ended."""
        self._random = random
        self._attempts = 0

    def connection_ended(self, uptime: float | None) -> None:
        """A connection has ended after so many seconds, or could not be made.

        One that held longer than the longest pause was a good one, and the next pause is short; a
        shorter one is no better than none.
        """
        if uptime is None:
            self.short_lived = 0
        elif uptime <= _MAX_SECONDS:
            self.short_lived += 1
        else:
            self.short_lived = self._attempts = 0

    def next_delay(self) -> float:
        """Seconds to wait now."""
        longest = min(_INITIAL_SECONDS * (1 << min(self._attempts, 16)), _MAX_SECONDS)
        self._attempts += 1
        return longest * self._random.uniform(0.5, 1)
