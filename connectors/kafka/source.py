"""Candles from Kafka: a member of a consumer group reads the topics of the series it follows.

Here is what talks to the brokers; what records mean is :mod:`kronos_connectors.kafka.topic_state`'s.
A consumer of aiokafka outlives most outages by itself, but says nothing of them: one that hears
from no broker for a while is let go, and another one is made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from random import Random

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError

from kronos_connectors._shared.client_errors import capture_aiokafka_errors
from kronos_connectors._shared.tls import ConnectionProblem
from kronos_connectors.kafka import group_consumer
from kronos_connectors.kafka.errors import explain
from kronos_connectors.kafka.group_consumer import REQUEST_TIMEOUT_SECONDS
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topic_state import InvalidRecord, PartitionBounds, TopicState
from kronos_connectors.kafka.topics import candle_topic
from kronos_stream.interfaces.source import LoginRefused, SourceCallbacks, SourceError, Traits
from kronos_stream.market.candle import Candle
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_log = structlog.get_logger()

_POLL_MS, _POLL_RECORDS = 500, 500
_COMMIT_INTERVAL_SECONDS, _COMMIT_TIMEOUT_SECONDS = 5.0, 2.0
_HISTORY_TIMEOUT_SECONDS, _HISTORY_POLL_SECONDS = 30.0, 0.05
_CLOSE_TIMEOUT_SECONDS = 2.0
_MIN_RETRY_SECONDS, _MAX_RETRY_SECONDS, _HEALTHY_SECONDS = 0.5, 30.0, 60.0


class KafkaSource:
    """Candles that others produce to ``PREFIX.candles.<timeframe>.v1``; their history, too."""

    # Nothing comes by itself: silence means that the producer is away, not that nothing trades.
    traits = Traits(fills_empty=True)

    def __init__(self, venue: str, options: KafkaOptions, clock: Clock, random: Random) -> None:
        self.venue = venue
        self._options, self._clock, self._random = options, clock, random
        # Venues such as kafka.us beside kafka must not take each other's partitions.
        self._group = options.group or f"{options.topic_prefix}-ingest"
        self._group += venue.removeprefix("kafka")
        self._topic_state = TopicState(options.topic_prefix, options.history_bars)
        self._consumer: AIOKafkaConsumer | None = None
        self._client_errors = capture_aiokafka_errors()
        self._has_series = asyncio.Event()
        self._problem = ""

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:
        options = self._options
        self._client_errors.clear()
        try:
            client = AIOKafkaClient(**options.client_arguments())
        except OSError as error:  # a certificate that has been changed since the start
            raise LoginRefused(f"kafka: {self._explain(error)}") from error
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
                await client.bootstrap()
                # All topics, since a broker may create what it is asked about by name.
                topics = (await client.fetch_all_metadata()).topics()
        except (KafkaError, OSError) as error:
            found = self._explain(error)
            kind = LoginRefused if found.permanent else SourceError
            raise kind(f"kafka: {found}") from error
        finally:
            with suppress(KafkaError, OSError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_SECONDS):
                    await client.close()
        wanted = {one: candle_topic(options.topic_prefix, one.timeframe) for one in series}
        return {
            one: f"no topic {name}, or no right to see it; to create it: "
            f"kronos-stream topics create --candles {one.timeframe}"
            for one, name in wanted.items()
            if name not in topics
        }

    def subscribe(self, series: Collection[Series]) -> None:
        self._topic_state.follow(series)
        if series:
            self._has_series.set()
        else:
            self._has_series.clear()

    async def run(self, callbacks: SourceCallbacks) -> None:
        tries = 0
        while True:
            await self._has_series.wait()
            began = self._now()
            try:
                await self._run_consumer(callbacks)
            except Exception as error:  # noqa: BLE001 - whatever it was, a new consumer begins anew
                if not isinstance(error, (KafkaError, OSError)):  # a timeout is an OSError, too
                    _log.exception("unexpected failure of the kafka consumer")
                callbacks.count_event("lost")
                why = str(self._explain(error))
                if why != self._problem:  # an outage is told of once
                    _log.warning("candles cannot be read from kafka", why=why)
                self._problem = why
            await self._close_consumer()
            tries = 0 if self._now() - began > _HEALTHY_SECONDS else tries + 1
            await self._clock.sleep(self._retry_delay(tries))

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        """What was read back and has come since; waits a while until all was read back."""
        began = self._now()
        while lack := self._topic_state.unavailable_reason(series, self._group):
            if self._now() - began > _HISTORY_TIMEOUT_SECONDS:
                raise SourceError(f"{lack} ({self._problem})" if self._problem else lack)
            await asyncio.sleep(_HISTORY_POLL_SECONDS)
        return self._topic_state.history(series, start, end, self._clock.now())

    async def close(self) -> None:
        if self._consumer is not None:
            await self._commit(self._consumer)
        await self._close_consumer()

    # -- one consumer ----------------------------------------------------------------------

    async def _run_consumer(self, intake: SourceCallbacks) -> None:
        """Read until there is nothing to follow. Raises KafkaError or OSError."""
        self._client_errors.clear()
        consumer = self._consumer = group_consumer.create_consumer(self._options, self._group)
        async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
            await consumer.start()
        intake.count_event("connected")
        listener, topics = (
            group_consumer.RebalanceListener(self._topic_state, consumer),
            frozenset[str](),
        )
        pulse, commit_at = group_consumer.LivenessCheck(self._now()), self._now()
        while self._topic_state.topics:
            if self._topic_state.topics != topics:
                topics = self._topic_state.topics
                consumer.subscribe(sorted(topics), listener=listener)
            await self._seek_to_start(consumer)
            await self._poll_records(consumer, intake)
            pulse.check(consumer, self._now())
            if self._now() >= commit_at:
                done = await self._commit(consumer)
                commit_at = self._now() + (1 if done else 10) * _COMMIT_INTERVAL_SECONDS
            await asyncio.sleep(0)  # records that wait already must not starve the others

    async def _seek_to_start(self, consumer: AIOKafkaConsumer) -> None:
        """Look up where partitions begin that are ours since just now."""
        reading, now = self._topic_state, self._clock.now()
        places = [TopicPartition(*place) for place in reading.pending]
        if not places:
            return
        async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
            firsts = await consumer.beginning_offsets(places)
            ends = await consumer.end_offsets(places)
            times = {place: reading.oldest_timestamp(place, now) for place in places}
            since = await consumer.offsets_for_times(times)
            committed = await asyncio.gather(*map(consumer.committed, places))
        behind = 0
        for place, offset in zip(places, committed, strict=True):
            if place in reading.pending and place in consumer.assignment():
                at = since.get(place)
                bounds = PartitionBounds(firsts[place], ends[place], at and at.offset, offset)
                start = reading.begin(place, bounds)
                consumer.seek(place, start)
                behind += ends[place] - start
        self._problem = ""
        self._client_errors.clear()
        _log.info("reads candles from kafka", partitions=len(places), records_back=behind)
        if shared := reading.shared_topics:
            _log.warning(
                "others read these topics with us, and take series from us; if they should not, "
                "set KRONOS_STREAM_KAFKA__GROUP to a name of our own",
                topics=shared,
                group=self._group,
            )

    async def _poll_records(self, consumer: AIOKafkaConsumer, intake: SourceCallbacks) -> None:
        """Wait a moment for records, and pass them on."""
        reading = self._topic_state
        try:
            # While the group shares out anew, aiokafka waits for that without end.
            async with asyncio.timeout(2 * _POLL_MS / 1000):
                batches = await consumer.getmany(timeout_ms=_POLL_MS, max_records=_POLL_RECORDS)
        except TimeoutError:
            batches = {}
        now = self._clock.now()
        for place, records in batches.items():
            for told in reading.read(place, records, now):
                if isinstance(told, InvalidRecord):
                    intake.reject(*told)
                else:
                    intake.update(told)
        for place in reading.catching_up:
            if place in consumer.assignment():
                reading.advance(place, await consumer.position(place))

    async def _commit(self, consumer: AIOKafkaConsumer) -> bool:
        """Let the brokers know how far we are: for those who watch the lag, not for ourselves."""
        ours = consumer.assignment()
        offsets = {
            TopicPartition(*place): offset
            for place, offset in self._topic_state.offsets_to_commit().items()
            if place in ours
        }
        if not offsets:
            return True
        try:
            async with asyncio.timeout(_COMMIT_TIMEOUT_SECONDS):
                await consumer.commit(offsets)
        except (KafkaError, OSError) as error:
            _log.debug("offsets not committed", why=str(error))
            return False
        self._topic_state.on_committed(offsets)
        return True

    async def _close_consumer(self) -> None:
        consumer, self._consumer = self._consumer, None
        self._topic_state.on_lost()
        if consumer is not None:
            await group_consumer.close_consumer(consumer)

    # -- small things ----------------------------------------------------------------------

    def _explain(self, error: BaseException) -> ConnectionProblem:
        silence = f"no answer in {REQUEST_TIMEOUT_SECONDS:g} s"
        return explain(error, self._client_errors, self._options, timeout_message=silence)

    def _retry_delay(self, tries: int) -> float:
        most = min(_MIN_RETRY_SECONDS * 2.0 ** min(tries, 10), _MAX_RETRY_SECONDS)
        return most * self._random.uniform(0.5, 1.0)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def build_source(venue: str, options: KafkaOptions, clock: Clock, random: Random) -> KafkaSource:
    """A source; it connects when it runs."""
    return KafkaSource(venue, options, clock, random)
