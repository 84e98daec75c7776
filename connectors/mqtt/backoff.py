"""How long to wait before the next try at connecting."""

from __future__ import annotations

from random import Random

_FIRST_SECONDS, _LONGEST_SECONDS = 0.25, 10.0


class Backoff:
    """Pauses that double up to a point, and never in step with those of others."""

    def __init__(self, random: Random) -> None:
        self.cut_short = 0
        """Connections in a row that were made and soon ended."""
        self._random = random
        self._tries = 0

    def ended(self, lasted: float | None) -> None:
        """A connection has ended after so many seconds, or could not be made.

        One that held longer than the longest pause was a good one, and the next pause is short; a
        shorter one is no better than none.
        """
        if lasted is None:
            self.cut_short = 0
        elif lasted <= _LONGEST_SECONDS:
            self.cut_short += 1
        else:
            self.cut_short = self._tries = 0

    def pause(self) -> float:
        """Seconds to wait now."""
        longest = min(_FIRST_SECONDS * (1 << min(self._tries, 16)), _LONGEST_SECONDS)
        self._tries += 1
        return longest * self._random.uniform(0.5, 1)
