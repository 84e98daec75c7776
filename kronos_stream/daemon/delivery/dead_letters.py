"""Dead letters of invalid frames and candles from venues."""

from __future__ import annotations

import asyncio
from collections import deque

import structlog

from kronos_stream.daemon.delivery.outbox import Outbox
from kronos_stream.forecast.compose import dead_letter
from kronos_stream.interfaces.sink import Envelope
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_log = structlog.get_logger()

_MAX_QUEUED = 100
_FLUSH_INTERVAL_SECONDS = 0.5
"""With ``_MAX_QUEUED``, at most 200 dead letters a second; the metrics count all of them."""


class DeadLetterQueue:
    """Bounded queue of dead letters, so that a flood of invalid data does not fill the outbox."""

    def __init__(self, outbox: Outbox, wall: Clock) -> None:
        self._outbox, self._wall = outbox, wall
        self._queue: deque[Envelope] = deque()
        self._dropped = 0
        self._wakeup = asyncio.Event()

    def put(self, series: Series | None, reason: str, raw: bytes) -> None:
        """Queue an invalid candle, or an invalid frame if ``series`` is None."""
        if len(self._queue) >= _MAX_QUEUED:
            self._dropped += 1
            return
        now = self._wall.now()
        self._queue.append(
            dead_letter("frame", reason, raw, at=now)
            if series is None
            else dead_letter("candle", reason, raw, at=now, series=series.name)
        )
        self._wakeup.set()

    async def run(self) -> None:
        """Move dead letters to the outbox at a limited rate until cancelled."""
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            await self.flush()
            await asyncio.sleep(_FLUSH_INTERVAL_SECONDS)

    async def flush(self) -> None:
        """Move all queued dead letters to the outbox."""
        envelopes = list(self._queue)
        self._queue.clear()
        if self._dropped:
            _log.warning("dead letters dropped, too many at once", number=self._dropped)
            self._dropped = 0
        if envelopes:
            await self._outbox.publish([], envelopes)
