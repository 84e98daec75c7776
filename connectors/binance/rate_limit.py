"""Request weight: what may be asked of a REST host, and when it wants to be left alone."""

from __future__ import annotations

import asyncio

from kronos_stream.interfaces.source import SourceError
from kronos_stream.market.clock import Clock

_MINUTE_MS = 60_000
_BURST_SECONDS = 5.0
"""The weight of so long may be spent at once."""


class WeightLimiter:
    """Weight that refills evenly, shared by all who ask one host; first come, first served.

    share: of ``per_minute``, the weight that the venue allows an address. The rest is for others
    there; where they have used it, we wait for the venue's next minute.
    """

    def __init__(self, per_minute: int, share: float, clock: Clock) -> None:
        self._clock = clock
        self._cap = per_minute * (1 + share) / 2
        self._rate = per_minute * share / _MINUTE_MS
        self._burst = self._rate * _BURST_SECONDS * 1000
        self._available, self._refilled_at = self._burst, clock.now()
        self._paused_until = 0
        self._lock = asyncio.Lock()

    async def acquire(self, weight: int) -> None:
        """Wait until ``weight`` may be spent. SourceError while the host is to be left alone."""
        async with self._lock:
            while True:
                now = self._clock.now()
                self._raise_if_paused(now)
                # The clock may be set back; then time begins anew.
                refill = max(0, now - self._refilled_at) * self._rate
                self._available = min(self._available + refill, max(self._burst, weight))
                self._refilled_at = now
                if self._available >= weight:
                    self._available -= weight
                    return
                # A little more than it takes, or rounding makes it a little less.
                await self._clock.sleep((weight - self._available) / self._rate / 1000 + 0.001)

    def pause(self, seconds: float) -> None:
        """Ask for nothing for ``seconds``; whoever waits is told."""
        until = self._clock.now() + round(1000 * seconds)
        self._paused_until = max(self._paused_until, until)

    def record_usage(self, weight: int, venue_time: int) -> None:
        """The venue has counted ``weight`` in this minute of its clock, ours and others'."""
        if weight >= self._cap:
            self.pause((_MINUTE_MS - venue_time % _MINUTE_MS) / 1000)

    def _raise_if_paused(self, now: int) -> None:
        wait = (self._paused_until - now) / 1000
        if wait > 0:
            raise SourceError(f"asked to wait for another {wait:.0f} s", wait)
