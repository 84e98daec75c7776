"""Exponential backoff with jitter."""

from __future__ import annotations

from random import Random

_MAX_DOUBLINGS = 16


class Backoff:
    """Delays that double from ``initial`` to ``maximum``, multiplied by a random factor.

    The jitter keeps many clients from retrying at the same moment. The unit is the caller's.
    """

    def __init__(
        self,
        random: Random,
        *,
        initial: float,
        maximum: float,
        jitter: tuple[float, float] = (0.5, 1.0),
    ) -> None:
        """jitter: bounds of the uniform factor that each delay is multiplied by."""
        self.attempts = 0
        """Delays returned since the last :meth:`reset`."""
        self._random, self._initial, self._maximum = random, initial, maximum
        self._jitter = jitter

    def current_delay(self) -> float:
        """Delay before the next attempt, without counting it."""
        delay = min(self._initial * (1 << min(self.attempts, _MAX_DOUBLINGS)), self._maximum)
        return delay * self._random.uniform(*self._jitter)

    def next_delay(self) -> float:
        """Delay before the next attempt."""
        delay = self.current_delay()
        self.attempts += 1
        return delay

    def reset(self) -> None:
        """Start again from ``initial``, after a success."""
        self.attempts = 0
