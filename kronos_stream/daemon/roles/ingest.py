"""Role ``ingest``: candles of venues to the candle topics, each closed bar in order.

A bar and its message are put into the state file together, so whatever is on the tape is on its
way to those who forecast; after a crash some come twice. There is no model here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from math import inf

from kronos_stream.daemon.delivery.publisher import DeadLetterQueue
from kronos_stream.daemon.intake.pipeline import IntakePipeline
from kronos_stream.daemon.requests import ForecastRequest
from kronos_stream.daemon.roles.venue import VenueRole
from kronos_stream.daemon.storage.state import PublishedBar
from kronos_stream.forecast.compose import candle, removal

_UNLIMITED_SECONDS = 1e10
"""Seconds."""
_YIELD_EVERY = 64
"""Messages composed before other tasks have their turn."""


class IngestRole(VenueRole):
    """One process's series, from the venues to the candle topics."""

    @property
    def _max_age(self) -> float:
        return _UNLIMITED_SECONDS  # a hole in the topic would cost more than bars that wait

    async def check(self) -> int:
        """Ask the venues for what is wanted, in place of :meth:`run`: how many series.

        Raises SettingsError for what the user can mend, SourceError where a venue does not answer.
        """
        try:
            await self._universe.check()
        finally:
            for source in self._sources.values():
                await source.close()
        return len(self._universe.series)

    async def drain(self) -> None:
        """Return once all that was taken in is passed on; what waits on time may."""
        await self._pipeline.drain()
        await self._outbox.drain(inf)

    async def _work(self) -> None:
        if not await self._run_until_stopped(self._start()):
            return
        async with asyncio.TaskGroup() as tasks:
            burying = tasks.create_task(self._dead_letters.run())
            await self._run_intake()
            began = asyncio.get_running_loop().time()
            await self._dead_letters.flush()
            await self._drain_outbox(began, batch_finished=True)
            burying.cancel()

    async def _start(self) -> None:
        """Ask the venues whether they have what is asked for, load the state."""
        settings = self.settings
        await self._resolve_universe()
        self._dead_letters = DeadLetterQueue(self._outbox, self._wall)
        self._pipeline = IntakePipeline(
            self._sources,
            self._state,
            self._record_latency,
            self._clock,
            self._random,
            self.metrics,
            lookback=settings.lookback,
            catch_up=settings.catch_up,
            degraded=settings.degraded,
            dead_letter=self._dead_letters.put,
            relay=self._relay,
        )
        self._series_status.track(lambda: self._pipeline.series_states)
        await self._pipeline.start(self._universe.series)
        await self._retract_removed_series()

    def _record_latency(self, request: ForecastRequest) -> None:
        self.metrics.close_to_received.observe(max(0, request.received - request.close) / 1000)

    async def _relay(self, passed: Sequence[PublishedBar]) -> None:
        """Save bars and put their messages into the outbox; all or none of both."""
        ours = [one for one in passed if one.series in self._universe.series]
        messages, received = [], []
        ahead = self._wall.now() - self._clock.now()
        for number, (series, bar, news) in enumerate(ours, 1):
            messages.append(candle(series, bar, history=not news, at=self._wall.now()))
            # The outbox measures latency by the wall clock, bars arrive by the market's.
            received.append(bar.received + ahead if news and bar.received else None)
            if number % _YIELD_EVERY == 0:
                await asyncio.sleep(0)
        await self._outbox.publish([], messages, ours, received=received)
        if len(ours) < len(passed):  # readers were told that these are gone
            await self._state.save_bars([one[:2] for one in passed if one not in ours])

    async def _retract(self, series: Sequence[str]) -> None:
        # Who follows one of them again begins without context.
        await self._state.reset_relayed(series)
        now = self._wall.now()
        gone = [removal(name, at=now)._replace(kind="candle") for name in series]
        await self._outbox.publish([], gone)
