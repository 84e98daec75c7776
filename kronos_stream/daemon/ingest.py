"""Role ``ingest``: candles of venues to the candle topics, each closed bar in order.

A bar and its message are put into the state file together, so whatever is on the tape is on its
way to those who forecast; after a crash some come twice. There is no model here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from math import inf

from kronos_stream.daemon.desk import Desk
from kronos_stream.daemon.due import Due
from kronos_stream.daemon.following import Following
from kronos_stream.daemon.outbox import Message
from kronos_stream.daemon.press import Graveyard
from kronos_stream.daemon.state import Passed
from kronos_stream.forecast.compose import candle, removal

_CENTURIES = 1e10
"""Seconds."""
_TURN = 64
"""Messages composed before other tasks have their turn."""


class Ingest(Following):
    """One process's series, from the venues to the candle topics."""

    @property
    def _max_age(self) -> float:
        return _CENTURIES  # a hole in the topic would cost more than bars that wait

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

    async def settled(self) -> None:
        """Return once all that was taken in is passed on; what waits on time may."""
        await self._desk.settled()
        await self._outbox.drain(inf)

    async def _work(self) -> None:
        if not await self._unless_stopped(self._start()):
            return
        async with asyncio.TaskGroup() as tasks:
            burying = tasks.create_task(self._graveyard.run())
            await self._take_in()
            began = asyncio.get_running_loop().time()
            await self._graveyard.flush()
            await self._deliver(began, whole=True)
            burying.cancel()

    async def _start(self) -> None:
        """Ask the venues whether they have what is asked for, load the state."""
        settings = self.settings
        await self._settle_universe()
        self._graveyard = Graveyard(self._outbox, self._wall)
        self._desk = Desk(
            self._sources,
            self._state,
            self._count,
            self._clock,
            self._random,
            self.metrics,
            lookback=settings.lookback,
            catch_up=settings.catch_up,
            degraded=settings.degraded,
            bury=self._graveyard.bury,
            relay=self._relay,
        )
        self._board.look_at(lambda: self._desk.followed)
        await self._desk.start(self._universe.series)
        await self._say_what_is_gone()

    def _count(self, due: Due) -> None:
        self.metrics.received.observe(max(0, due.received - due.close) / 1000)

    async def _relay(self, passed: Sequence[Passed]) -> None:
        """Save bars and put their messages into the outbox; all or none of both."""
        ours = [one for one in passed if one.series in self._universe.series]
        messages = []
        ahead = self._wall.now() - self._clock.now()
        for number, (series, bar, news) in enumerate(ours, 1):
            composed = candle(series, bar, history=not news, at=self._wall.now())
            # The outbox measures latency by the wall clock, bars arrive by the market's.
            arrived = bar.received + ahead if news and bar.received else None
            messages.append(Message("candle", *composed[1:], arrived))
            if number % _TURN == 0:
                await asyncio.sleep(0)
        await self._outbox.publish([], messages, ours)
        if len(ours) < len(passed):  # readers were told that these are gone
            await self._state.save_bars([one[:2] for one in passed if one not in ours])

    async def _retract(self, series: Sequence[str]) -> None:
        # Who follows one of them again begins without context.
        await self._state.relay_again(series)
        now = self._wall.now()
        gone = [removal(name, at=now) for name in series]
        await self._outbox.publish([], [Message("candle", *one[1:]) for one in gone])
