"""Role ``ingest``: closed bars of the venues to the candle topics, in order per series.

A bar and its message enter the state file in one transaction, so every saved bar reaches the
topic; after a crash some are published twice. This role loads no model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from random import Random

from kronos_stream.daemon.config.settings import Settings
from kronos_stream.daemon.requests import ForecastRequest
from kronos_stream.daemon.roles.base import Role
from kronos_stream.daemon.roles.venue_intake import VenueIntake
from kronos_stream.daemon.storage.state import PublishedBar
from kronos_stream.forecast.compose import candle, removal
from kronos_stream.interfaces.sink import Sink
from kronos_stream.interfaces.source import Source
from kronos_stream.market.clock import Clock

_UNLIMITED_SECONDS = 1e10
_YIELD_EVERY = 64
"""Messages composed before other tasks run."""


class IngestRole(Role):
    """Everything from the candles of venues to the candle topics."""

    _intake: VenueIntake

    def __init__(
        self,
        settings: Settings,
        sources: Mapping[str, Source],
        sinks: Sequence[Sink],
        *,
        clock: Clock,
        random: Random,
    ) -> None:
        super().__init__(settings, sinks, clock=clock, random=random)
        self._max_age_seconds = _UNLIMITED_SECONDS  # a gap in the topic is worse than old bars
        self._intake = VenueIntake(
            settings,
            sources,
            self._series_status,
            self.metrics,
            clock=clock,
            wall=self._wall,
            random=random,
        )

    async def drain(self) -> None:
        await self._intake.pipeline.drain()
        await super().drain()

    async def _start(self) -> None:
        await self._intake.resolve(self._state)
        await self._intake.start(
            self._record_latency, self._dead_letters.put, self._retract, self._relay
        )

    def _record_latency(self, request: ForecastRequest) -> None:
        self.metrics.close_to_received.observe(max(0, request.received - request.close) / 1000)

    async def _relay(self, bars: Sequence[PublishedBar]) -> None:
        """Save bars and put their messages into the outbox, all or none."""
        followed = [one for one in bars if one.series in self._intake.universe.series]
        messages, received = [], []
        ahead = self._wall.now() - self._clock.now()
        for number, (series, bar, is_new) in enumerate(followed, 1):
            messages.append(candle(series, bar, history=not is_new, at=self._wall.now()))
            # The outbox measures latency by the wall clock, bars arrive by the market's.
            received.append(bar.received + ahead if is_new and bar.received else None)
            if number % _YIELD_EVERY == 0:
                await asyncio.sleep(0)
        await self._outbox.publish([], messages, followed, received=received)
        if len(followed) < len(bars):  # the others were retracted
            await self._state.save_bars([one[:2] for one in bars if one not in followed])

    async def _retract(self, series: Sequence[str]) -> None:
        # A series that is followed again starts with its whole context.
        await self._state.reset_relayed(series)
        now = self._wall.now()
        removals = [removal(name, at=now)._replace(kind="candle") for name in series]
        await self._outbox.publish([], removals)
