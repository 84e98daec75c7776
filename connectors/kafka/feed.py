"""Candle topics for role forecast: as a member of a consumer group, in one seat after the other.

What is read and what is done is the reader's (:mod:`kronos_stream.market.feed`). Notes are the
group's committed offsets and their metadata.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random

import structlog
from aiokafka.errors import KafkaError

from kronos_connectors.kafka.chatter import listen
from kronos_connectors.kafka.checks import Right, checks_of_candles
from kronos_connectors.kafka.member import ANSWER_SECONDS
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.reasons import fault
from kronos_connectors.kafka.seat import NoTopic, Seat
from kronos_connectors.kafka.topics import candles
from kronos_stream.checkup import Check
from kronos_stream.market.clock import Clock
from kronos_stream.market.feed import FeedNeeds, PartitionHandler

_log = structlog.get_logger()

_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, _HEALTHY_SECONDS = 0.5, 30.0, 60.0


class KafkaFeed:
    """One seat in the group at a time, given up whenever there is doubt about it."""

    def __init__(
        self, options: KafkaOptions, needs: FeedNeeds, clock: Clock, random: Random
    ) -> None:
        self.turns = 0
        """Grows while it works, whether there is something to read or not."""
        self._options, self._needs, self._clock, self._random = options, needs, clock, random
        self._topics = {candles(options.topic_prefix, one): one for one in needs.timeframes}
        self._group = options.group or f"{options.topic_prefix}-forecast"
        self._chatter = listen()
        self._why = "not connected to kafka yet"
        self._seat: Seat | None = None

    @property
    def trouble(self) -> str:
        """Why nothing can be read or noted just now, in words; empty if all is well."""
        if self._seat is None or not self._seat.reads:
            return self._why
        error = self._seat.unnoted
        return f"what is done cannot be committed: {self._explained(error)}" if error else ""

    def checks(self, *, writes: bool) -> Sequence[Check]:
        right: Right = "Write" if writes else "Read"
        return checks_of_candles(self._options, self._needs.timeframes, right)

    async def run(self, reader: PartitionHandler) -> None:
        """Read until cancelled, reconnecting by itself."""
        tries = 0
        while True:
            began = self._now()
            self._chatter.forget()
            try:
                self._seat = Seat(
                    self._options, self._group, self._topics, self._needs, self._clock, reader
                )
                async for _ in self._seat.turns():
                    self.turns += 1
            except NoTopic as error:
                self._complain(str(error))
            except Exception as error:  # noqa: BLE001 - whatever it was, a new seat begins anew
                if not isinstance(error, (KafkaError, OSError)):  # a timeout is an OSError, too
                    _log.exception("unexpected failure of the kafka consumer")
                self._complain(self._explained(error))
            if self._seat is not None:
                await self._seat.leave()
                self._seat = None
            tries = 0 if self._now() - began > _HEALTHY_SECONDS else tries + 1
            await self._clock.sleep(self._pause(tries))
            self.turns += 1

    async def close(self) -> None:
        """Note what is done, and leave the group, so that others need not wait; bounded."""
        if self._seat is not None:
            await self._seat.close()

    def _complain(self, why: str) -> None:
        if why != self._why:  # an outage is told of once
            _log.warning("candles cannot be read from kafka", why=why)
        self._why = why

    def _explained(self, error: BaseException) -> str:
        silence = f"no answer in {ANSWER_SECONDS:g} s"
        return str(fault(error, self._chatter, self._options, silence=silence))

    def _pause(self, tries: int) -> float:
        most = min(_SHORTEST_PAUSE_SECONDS * 2.0 ** min(tries, 10), _LONGEST_PAUSE_SECONDS)
        return most * self._random.uniform(0.5, 1.0)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def build_feed(options: KafkaOptions, needs: FeedNeeds, clock: Clock, random: Random) -> KafkaFeed:
    """A feed; it connects when it runs."""
    return KafkaFeed(options, needs, clock, random)
