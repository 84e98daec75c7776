"""Candles from Kafka, read as a member of a consumer group.

:mod:`kronos_connectors.kafka.topic_state` defines what the records mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from random import Random

from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError

from kronos_connectors._shared.client_errors import capture_aiokafka_errors
from kronos_connectors.kafka.errors import explain
from kronos_connectors.kafka.group_consumer import REQUEST_TIMEOUT_SECONDS, GroupOptions
from kronos_connectors.kafka.group_session import GroupSession
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.records import CandleRecord
from kronos_connectors.kafka.topic_state import DecodedRecord, TopicState
from kronos_connectors.kafka.topics import candle_topic, missing_topics_message
from kronos_stream.interfaces.feed import Unreadable
from kronos_stream.interfaces.source import LoginRefused, SourceCallbacks, SourceError, Traits
from kronos_stream.market.candle import Candle
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_HISTORY_TIMEOUT_SECONDS, _HISTORY_POLL_SECONDS = 30.0, 0.05
_CLOSE_TIMEOUT_SECONDS = 2.0


class KafkaSource:
    """Candles that others produce to ``PREFIX.candles.<timeframe>.v1``, and their history."""

    # Silence means that the producer is down, not that nothing trades.
    traits = Traits(fills_empty=True)

    def __init__(self, venue: str, options: KafkaOptions, clock: Clock, random: Random) -> None:
        self.venue = venue
        self._options = options
        # Venues such as kafka.us beside kafka must not share their partitions.
        group = options.group or f"{options.topic_prefix}-ingest"
        self._group = GroupOptions(
            group + venue.removeprefix("kafka"),
            context_bars=options.history_bars,
            commit_interval=5.0,
            commit_timeout=2.0,
        )
        self._topic_state = TopicState(
            options.topic_prefix,
            options.history_bars,
            clock,
            emit=self._emit,
            partition_count=lambda topic: self._session.partition_count(topic),  # noqa: PLW0108
        )
        self._session = GroupSession[CandleRecord](
            options, self._group, self._topic_state, lambda _, record: record, clock, random
        )
        self._callbacks: SourceCallbacks | None = None
        self._has_series = asyncio.Event()

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:
        options, client_errors = self._options, capture_aiokafka_errors()
        client_errors.clear()
        client: AIOKafkaClient | None = None
        try:
            client = AIOKafkaClient(**options.client_arguments())
            async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
                await client.bootstrap()
                # All topics: a broker may create a topic that is requested by name.
                topics = (await client.fetch_all_metadata()).topics()
        except (KafkaError, OSError) as error:
            timeout_message = f"no answer in {REQUEST_TIMEOUT_SECONDS:g} s"
            found = explain(error, client_errors, options, timeout_message=timeout_message)
            kind = LoginRefused if found.permanent else SourceError
            raise kind(f"kafka: {found}", has_remedy=bool(found.remedy)) from error
        finally:
            if client is not None:
                with suppress(KafkaError, OSError):
                    async with asyncio.timeout(_CLOSE_TIMEOUT_SECONDS):
                        await client.close()
        needed = {one: candle_topic(options.topic_prefix, one.timeframe) for one in series}
        return {
            one: missing_topics_message([topic])
            for one, topic in needed.items()
            if topic not in topics
        }

    def subscribe(self, series: Collection[Series]) -> None:
        restart = self._topic_state.follow(series)
        self._session.read_topics(self._topic_state.timeframes, restart=restart)
        if series:
            self._has_series.set()
        else:
            self._has_series.clear()

    async def run(self, callbacks: SourceCallbacks) -> None:
        self._callbacks = callbacks
        while True:
            await self._has_series.wait()
            await self._session.run(callbacks.count_event)

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        """Bars read so far; waits for the backlog, within limits."""
        deadline = asyncio.get_running_loop().time() + _HISTORY_TIMEOUT_SECONDS
        while reason := self._topic_state.unavailable_reason(series, self._group.name):
            if asyncio.get_running_loop().time() > deadline:
                failure = self._session.failure
                raise SourceError(f"{reason} ({failure})" if failure else reason)
            await asyncio.sleep(_HISTORY_POLL_SECONDS)
        return self._topic_state.history(series, start, end)

    async def close(self) -> None:
        await self._session.close()

    def _emit(self, record: DecodedRecord) -> None:
        if self._callbacks is None:
            return
        if isinstance(record, Unreadable):
            self._callbacks.reject(*record)
        else:
            self._callbacks.update(record)


def build_source(venue: str, options: KafkaOptions, clock: Clock, random: Random) -> KafkaSource:
    """A source; it connects when it runs."""
    return KafkaSource(venue, options, clock, random)
