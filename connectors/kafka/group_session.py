"""Membership in a consumer group: join, poll, rebalance, commit, reconnect.

While the group rebalances, no records arrive; that may take as long as the slowest member needs to
hand over. At any other time, brokers that do not answer fetches are considered down. A consumer of
aiokafka survives most outages but does not report them, so it is replaced after each failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from random import Random
from typing import Generic, TypeVar

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import KafkaError

from kronos_connectors._shared.client_errors import capture_aiokafka_errors
from kronos_connectors.kafka import group_consumer
from kronos_connectors.kafka.errors import explain
from kronos_connectors.kafka.group_consumer import REQUEST_TIMEOUT_SECONDS, GroupOptions
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.records import CandleRecord, oldest_timestamp
from kronos_connectors.kafka.topics import missing_topics_message
from kronos_stream.backoff import Backoff
from kronos_stream.interfaces.feed import (
    Checkpoint,
    Partition,
    PartitionBounds,
    PartitionHandler,
)
from kronos_stream.market.clock import Clock
from kronos_stream.market.timeframe import Timeframe

_log = structlog.get_logger()
_T = TypeVar("_T")

_POLL_MS, _POLL_RECORDS = 200, 500
_COMMIT_FAILURES_BEFORE_WARNING = 3
_REBALANCE_DEADLINE_SECONDS = 120.0
_TOPIC_CHECK_SECONDS = 60.0
"""Interval of the check that all topics exist."""
_MIN_RETRY_SECONDS, _MAX_RETRY_SECONDS, _HEALTHY_SECONDS = 0.5, 30.0, 60.0
"""A connection that held longer than the last of these resets the retry delay."""


class TopicNotFound(Exception):  # noqa: N818
    """A topic does not exist, or is hidden from us."""


class GroupSession(ConsumerRebalanceListener, Generic[_T]):  # type: ignore[misc]
    """One membership in a group, by one consumer after the other."""

    def __init__(
        self,
        kafka: KafkaOptions,
        group: GroupOptions,
        handler: PartitionHandler[_T],
        decode: Callable[[Partition, CandleRecord], _T],
        clock: Clock,
        random: Random,
    ) -> None:
        self.iterations = 0
        """Polls and connection attempts so far."""
        self.failure = ""
        """Cause of the current outage, and its remedy; empty while partitions are read."""
        self._kafka, self._group, self._clock = kafka, group, clock
        self._handler, self._decode = handler, decode
        self._timeframes: Mapping[str, Timeframe] = {}
        self._backoff = Backoff(random, initial=_MIN_RETRY_SECONDS, maximum=_MAX_RETRY_SECONDS)
        self._client_errors = capture_aiokafka_errors()
        self._consumer: AIOKafkaConsumer | None = None
        self._assigned = False
        self._pending: set[Partition] = set()
        """Assigned partitions without a start offset."""
        self._positions: dict[Partition, int] = {}
        self._end_offsets: dict[Partition, int] = {}
        self._commit_lock, self._commit_failures = asyncio.Lock(), 0
        self._commit_error = ""

    @property
    def problem(self) -> str:
        """Why records are not read or offsets not committed; empty if all is well."""
        if self._ready:
            return self._commit_error
        return self.failure or "waiting for kafka to assign partitions"

    @property
    def _ready(self) -> bool:
        return self._assigned and not self._pending

    def read_topics(
        self, timeframes: Mapping[str, Timeframe], *, restart: Collection[str] = ()
    ) -> None:
        """Set the topics to read, with their timeframes; may be called while running.

        restart: topics to start again, by :meth:`PartitionHandler.start_partition`.
        """
        self._timeframes = timeframes
        self._pending |= {partition for partition in self._positions if partition.log in restart}

    def partition_count(self, topic: str) -> int:
        """Number of partitions of a topic, 0 while unknown."""
        consumer = self._consumer
        return 0 if consumer is None else len(consumer.partitions_for_topic(topic) or ())

    async def run(self, on_event: Callable[[str], None]) -> None:
        """Read while there are topics; reconnect after failures.

        on_event: called with "connected" and "lost".
        """
        while self._timeframes:
            began = self._now()
            self._client_errors.clear()
            try:
                await self._read(on_event)
            except Exception as error:  # noqa: BLE001 - a new consumer replaces one that failed
                self._report_failure(error)
                on_event("lost")
            await self._leave()
            if self._now() - began > _HEALTHY_SECONDS:
                self._backoff.reset()
            await self._clock.sleep(self._backoff.next_delay())
            self.iterations += 1

    async def close(self) -> None:
        """Commit and leave the group, so that other members take over at once; bounded."""
        if self._consumer is not None:
            await self._commit(self._consumer)
            await group_consumer.close_consumer(self._consumer)
            self._consumer = None

    # -- one consumer ----------------------------------------------------------------------

    async def _read(self, on_event: Callable[[str], None]) -> None:
        """Read by a new consumer. Raises TopicNotFound, KafkaError or OSError."""
        consumer = self._consumer = group_consumer.create_consumer(self._kafka, self._group)
        self._commit_failures, self._commit_error = 0, ""
        async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
            await consumer.start()
        on_event("connected")
        subscribed = frozenset[str]()
        now = commit_at = check_at = polled_at = self._now()
        liveness = group_consumer.LivenessCheck(now)
        while topics := frozenset(self._timeframes):
            if self._group.check_topics and now >= check_at:
                await self._check_topics(consumer, topics)
                check_at = now + _TOPIC_CHECK_SECONDS
            if topics != subscribed:
                consumer.subscribe(sorted(topics), listener=self)
                subscribed = topics
            await self._start_partitions(consumer)
            fetching = self._apply_pauses(consumer)
            polled, now = await self._poll(consumer), self._now()
            if polled:
                polled_at = now
            elif now - polled_at > _REBALANCE_DEADLINE_SECONDS:
                raise KafkaError(
                    f"the group did not rebalance in {_REBALANCE_DEADLINE_SECONDS:g} s"
                )
            if polled and fetching:
                liveness.check(consumer, now)
            else:
                liveness = group_consumer.LivenessCheck(now)
            if now >= commit_at:
                self._report_lag(consumer)
                committed = await self._commit(consumer)
                commit_at = now + (1 if committed else 10) * self._group.commit_interval
            self.iterations += 1
            await asyncio.sleep(0)  # a long backlog must not block other tasks

    async def _leave(self) -> None:
        """Finish pending work, commit and leave the group; bounded."""
        if self._consumer is None:
            return
        await self._handler.drain()
        await self._commit(self._consumer)
        self._on_revoked()
        await group_consumer.close_consumer(self._consumer)
        self._consumer = None

    def _report_failure(self, error: Exception) -> None:
        """Log each outage once."""
        if not isinstance(error, (TopicNotFound, KafkaError, OSError)):
            _log.exception("unexpected failure of the kafka consumer")
        failure = self._explain(error)
        if failure != self.failure:
            _log.warning("candles cannot be read from kafka", why=failure)
        self.failure = failure

    def _explain(self, error: BaseException) -> str:
        timeout_message = f"no answer in {REQUEST_TIMEOUT_SECONDS:g} s"
        return str(
            explain(error, self._client_errors, self._kafka, timeout_message=timeout_message)
        )

    async def _check_topics(self, consumer: AIOKafkaConsumer, topics: frozenset[str]) -> None:
        async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
            existing = await consumer.topics()
        if missing := topics - existing:
            raise TopicNotFound(missing_topics_message(missing))

    # -- assigned partitions ---------------------------------------------------------------

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Release all partitions; the group waits meanwhile. Called by aiokafka."""
        try:
            if self._consumer is not None and any(True for _ in revoked):
                await self._handler.drain()
                await self._commit(self._consumer)
        except Exception:  # noqa: BLE001 - aiokafka would not report it
            _log.exception("partitions not handed over completely")
        finally:
            self._on_revoked()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Take over exactly these partitions, or none. Called by aiokafka."""
        partitions = [Partition(*place) for place in assigned]
        self._pending = set(partitions)
        self._handler.on_assigned(partitions)
        self._assigned = True
        if not partitions:
            self.failure = ""

    def _on_revoked(self) -> None:
        self._assigned = False
        self._pending.clear()
        self._positions.clear()
        self._handler.on_revoked()

    async def _start_partitions(self, consumer: AIOKafkaConsumer) -> None:
        """Look up the bounds of newly assigned partitions, and seek to their start offsets."""
        places = [TopicPartition(*one) for one in self._pending if one.log in self._timeframes]
        if not places:
            return
        async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
            firsts = await consumer.beginning_offsets(places)
            ends = await consumer.end_offsets(places)
            now, bars = self._clock.now(), self._group.context_bars
            oldest = await consumer.offsets_for_times(
                {one: oldest_timestamp(self._timeframes[one.topic], bars, now) for one in places}
            )
            committed = await group_consumer.fetch_committed(self._kafka, self._group.name, places)
        records_behind = 0
        for place in places:
            partition = Partition(*place)
            if partition not in self._pending or place not in consumer.assignment():
                continue  # revoked meanwhile
            found, note, end = oldest.get(place), committed[place], ends[place]
            checkpoint = None if note.offset < 0 else Checkpoint(note.offset, note.metadata or "")
            bounds = PartitionBounds(
                firsts[place], end, end if found is None else found.offset, checkpoint
            )
            start = self._positions[partition] = self._handler.start_partition(partition, bounds)
            self._pending.discard(partition)
            self._end_offsets[partition] = end
            consumer.seek(place, start)
            records_behind += end - start
        self.failure = ""
        self._client_errors.clear()
        _log.info("reading candle topics", partitions=len(places), records_behind=records_behind)

    # -- records ---------------------------------------------------------------------------

    def _apply_pauses(self, consumer: AIOKafkaConsumer) -> bool:
        """Pause and resume partitions as the handler asks. Returns whether any is fetched."""
        assigned, paused = consumer.assignment(), consumer.paused()
        to_pause = {TopicPartition(*partition) for partition in self._handler.paused()}
        if resumed := (paused - to_pause) & assigned:
            consumer.resume(*resumed)
        if new := (to_pause - paused) & assigned:
            consumer.pause(*new)
        return bool(assigned - to_pause)

    async def _poll(self, consumer: AIOKafkaConsumer) -> bool:
        """Wait briefly for records, and pass them on. Returns False during a rebalance."""
        try:
            # aiokafka waits for the end of a rebalance without limit.
            async with asyncio.timeout(2 * _POLL_MS / 1000):
                batches = await consumer.getmany(timeout_ms=_POLL_MS, max_records=_POLL_RECORDS)
        except TimeoutError:
            return False
        for place, records in batches.items():
            self._dispatch(Partition(*place), records, records[-1].offset + 1)
        for partition in [*self._positions]:
            place = TopicPartition(*partition)
            if place not in batches and place in consumer.assignment():
                # Offsets of transaction markers hold no records.
                async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
                    self._dispatch(partition, (), await consumer.position(place))
        return True

    def _dispatch(
        self, partition: Partition, records: Sequence[CandleRecord], next_offset: int
    ) -> None:
        if next_offset > self._positions.get(partition, next_offset):
            self._positions[partition] = next_offset
            decoded = [(record.offset, self._decode(partition, record)) for record in records]
            self._handler.on_records(partition, decoded, next_offset)

    def _report_lag(self, consumer: AIOKafkaConsumer) -> None:
        if not self._ready:
            return
        lags = dict.fromkeys(self._timeframes, 0)
        for partition, position in self._positions.items():
            with suppress(KafkaError, AssertionError):  # not assigned any more
                end = consumer.highwater(TopicPartition(*partition)) or 0
                lag = max(end, self._end_offsets[partition]) - position
                lags[partition.log] += max(0, lag)
        self._handler.on_lag(lags)

    # -- offsets ---------------------------------------------------------------------------

    async def _commit(self, consumer: AIOKafkaConsumer) -> bool:
        """Commit the handler's checkpoints. Returns False on failure; bounded."""
        async with self._commit_lock:
            assigned = consumer.assignment()
            checkpoints = {
                partition: checkpoint
                for partition, checkpoint in self._handler.pending_checkpoints().items()
                if partition in assigned
            }
            if not checkpoints:
                return True
            offsets = {TopicPartition(*part): (*note,) for part, note in checkpoints.items()}
            try:
                async with asyncio.timeout(self._group.commit_timeout):
                    await consumer.commit(offsets)
            except (KafkaError, OSError) as error:
                self._commit_failures += 1
                if self._commit_failures >= _COMMIT_FAILURES_BEFORE_WARNING:
                    self._commit_error = f"offsets cannot be committed: {self._explain(error)}"
                if self._commit_failures == _COMMIT_FAILURES_BEFORE_WARNING:
                    _log.warning("offsets cannot be committed", why=repr(error))
                return False
            self._commit_failures, self._commit_error = 0, ""
            self._handler.on_checkpointed(checkpoints)
            return True

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
