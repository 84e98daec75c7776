"""Candle topics for role forecast: as a member of a consumer group, in one seat after the other.

What is read and what is done is the reader's (:mod:`kronos_stream.interfaces.feed`). Notes are the
group's committed offsets and their metadata.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random

import structlog
from aiokafka.errors import KafkaError

from kronos_connectors._shared.client_errors import capture_aiokafka_errors
from kronos_connectors.kafka.checks import Operation, candle_checks
from kronos_connectors.kafka.errors import explain
from kronos_connectors.kafka.group_consumer import REQUEST_TIMEOUT_SECONDS
from kronos_connectors.kafka.group_session import GroupSession, TopicNotFound
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import candle_topic
from kronos_stream.interfaces.diagnostics import Check
from kronos_stream.interfaces.feed import FeedNeeds, PartitionHandler
from kronos_stream.market.clock import Clock

_log = structlog.get_logger()

_MIN_RETRY_SECONDS, _MAX_RETRY_SECONDS, _HEALTHY_SECONDS = 0.5, 30.0, 60.0


class KafkaFeed:
    """One seat in the group at a time, given up whenever there is doubt about it."""

    def __init__(
        self, options: KafkaOptions, needs: FeedNeeds, clock: Clock, random: Random
    ) -> None:
        self.iterations = 0
        """Grows while it works, whether there is something to read or not."""
        self._options, self._needs, self._clock, self._random = options, needs, clock, random
        self._topics = {candle_topic(options.topic_prefix, one): one for one in needs.timeframes}
        self._group = options.group or f"{options.topic_prefix}-forecast"
        self._client_errors = capture_aiokafka_errors()
        self._problem = "not connected to kafka yet"
        self._session: GroupSession | None = None

    @property
    def problem(self) -> str:
        """Why nothing can be read or noted just now, in words; empty if all is well."""
        if self._session is None or not self._session.ready:
            return self._problem
        error = self._session.commit_error
        return f"what is done cannot be committed: {self._explain(error)}" if error else ""

    def checks(self, *, writes: bool) -> Sequence[Check]:
        right: Operation = "Write" if writes else "Read"
        return candle_checks(self._options, self._needs.timeframes, right)

    async def run(self, handler: PartitionHandler) -> None:
        """Read until cancelled, reconnecting by itself."""
        tries = 0
        while True:
            began = self._now()
            self._client_errors.clear()
            try:
                self._session = GroupSession(
                    self._options, self._group, self._topics, self._needs, self._clock, handler
                )
                async for _ in self._session.poll():
                    self.iterations += 1
            except TopicNotFound as error:
                self._report_problem(str(error))
            except Exception as error:  # noqa: BLE001 - whatever it was, a new seat begins anew
                if not isinstance(error, (KafkaError, OSError)):  # a timeout is an OSError, too
                    _log.exception("unexpected failure of the kafka consumer")
                self._report_problem(self._explain(error))
            if self._session is not None:
                await self._session.drain_and_close()
                self._session = None
            tries = 0 if self._now() - began > _HEALTHY_SECONDS else tries + 1
            await self._clock.sleep(self._retry_delay(tries))
            self.iterations += 1

    async def close(self) -> None:
        """Note what is done, and leave the group, so that others need not wait; bounded."""
        if self._session is not None:
            await self._session.close()

    def _report_problem(self, problem: str) -> None:
        if problem != self._problem:  # an outage is told of once
            _log.warning("candles cannot be read from kafka", why=problem)
        self._problem = problem

    def _explain(self, error: BaseException) -> str:
        silence = f"no answer in {REQUEST_TIMEOUT_SECONDS:g} s"
        return str(explain(error, self._client_errors, self._options, timeout_message=silence))

    def _retry_delay(self, tries: int) -> float:
        most = min(_MIN_RETRY_SECONDS * 2.0 ** min(tries, 10), _MAX_RETRY_SECONDS)
        return most * self._random.uniform(0.5, 1.0)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def build_feed(options: KafkaOptions, needs: FeedNeeds, clock: Clock, random: Random) -> KafkaFeed:
    """A feed; it connects when it runs."""
    return KafkaFeed(options, needs, clock, random)
