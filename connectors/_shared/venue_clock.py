"""Venue's clock, as measured by ours."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from kronos_stream.market.clock import Clock

_log = structlog.get_logger()

_MAX_DRIFT = 5e-4
"""Assumed drift between the two clocks; real ones are ten times better."""

_VALID_MS = 60_000
_MAX_JUMP_MS = 1_000
"""Our clock counts as set when it moves this much more or less than the machine's uptime."""

_NOTABLE_OFFSET_MS = 2_000


class VenueClock:
    """Offset of the venue's clock. Times are UTC ms, ``uptime`` seconds of a monotonic clock."""

    def __init__(self) -> None:
        self.offset = 0
        """Milliseconds that the venue's clock is ahead of ours."""
        self._uncertainty = 0
        self._measured: tuple[int, float] | None = None

    def update(self, before: int, venue_time: int, after: int, uptime: float) -> None:
        """Record that the venue's time was ``venue_time`` between ``before`` and ``after``."""
        self.offset = venue_time - (before + after) // 2
        self._uncertainty = max(0, after - before) // 2 + 1
        self._measured = after, uptime

    def needs_update(self, now: int, uptime: float) -> bool:
        """Return whether the offset was never measured or may have changed."""
        if self._measured is None:
            return True
        then, then_uptime = self._measured
        passed = now - then
        return (
            not 0 <= passed < _VALID_MS
            or abs(passed - 1000 * (uptime - then_uptime)) > _MAX_JUMP_MS
        )

    def lower_bound(self, now: int) -> int:
        """Earliest possible venue time: bars that have closed by then are closed at the venue."""
        age = 0 if self._measured is None else now - self._measured[0]
        return now + self.offset - self._uncertainty - round(_MAX_DRIFT * age)


class SyncedVenueClock:
    """Venue's clock that is measured again when needed, once for all concurrent callers."""

    def __init__(
        self,
        clock: Clock,
        server_time: Callable[[], Awaitable[int]] | None,
        on_skew: Callable[[], None],
        **log_fields: str,
    ) -> None:
        """server_time: requests the venue's time, UTC ms; None: assume that it equals ours.

        on_skew: called when a measured offset is two seconds or more.
        """
        self._clock, self._server_time = clock, server_time
        self._on_skew, self._log_fields = on_skew, log_fields
        self._measured = VenueClock()
        self._lock = asyncio.Lock()

    @property
    def offset(self) -> int:
        """Milliseconds that the venue's clock is ahead of ours, as measured last."""
        return self._measured.offset

    async def lower_bound(self) -> int:
        """UTC ms by the venue's clock, or slightly less. Raises SourceError."""
        if self._server_time is not None:
            uptime = asyncio.get_running_loop().time
            async with self._lock:
                before = self._clock.now()
                if self._measured.needs_update(before, uptime()):
                    venue_time = await self._server_time()
                    self._measured.update(before, venue_time, self._clock.now(), uptime())
                    if abs(self.offset) >= _NOTABLE_OFFSET_MS:
                        self._on_skew()
                        _log.warning(
                            "our clock differs from the venue's",
                            **self._log_fields,
                            ms=-self.offset,
                        )
        return self._measured.lower_bound(self._clock.now())
