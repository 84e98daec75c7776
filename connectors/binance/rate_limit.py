"""Limit of the request weight that a REST host allows."""

from __future__ import annotations

import asyncio

from kronos_connectors._shared.http_status import check_pause
from kronos_stream.market.clock import Clock

_MINUTE_MS = 60_000
_BURST_SECONDS = 5.0
"""The weight of this long may be spent at once."""


class WeightLimiter:
    """Token bucket of request weight, shared by all requests to one host in order of arrival.

    It gives out ``share`` of ``per_minute``, the weight that the venue allows an address. If other
    programs there have used up the rest, requests pause until the venue's next minute.
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
        """Wait until ``weight`` may be spent. Raises SourceError during a pause."""
        async with self._lock:
            while True:
                now = self._clock.now()
                check_pause((self._paused_until - now) / 1000)
                # The clock may be set back: refill from its new time on.
                refill = max(0, now - self._refilled_at) * self._rate
                self._available = min(self._available + refill, max(self._burst, weight))
                self._refilled_at = now
                if self._available >= weight:
                    self._available -= weight
                    return
                # One millisecond more, as rounding may take some off.
                await self._clock.sleep((weight - self._available) / self._rate / 1000 + 0.001)

    def pause(self, seconds: float) -> None:
        """Fail all requests for ``seconds``, waiting ones too."""
        until = self._clock.now() + round(1000 * seconds)
        self._paused_until = max(self._paused_until, until)

    def record_usage(self, weight: int, venue_time: int) -> None:
        """Record the weight of all programs in the current minute of the venue's clock."""
        if weight >= self._cap:
            self.pause((_MINUTE_MS - venue_time % _MINUTE_MS) / 1000)
