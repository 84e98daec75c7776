"""Records to Kafka: acknowledged by all in-sync replicas, in order per key.

aiokafka's own batches do not show which record a broker refused, and later records of the same
partition then fail with OutOfOrderSequenceNumber or even arrive before it. So batches are built
here: one per partition at a time, the next one once it is acknowledged. A refused batch is sent
again record by record, by a new producer with a new sequence.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Coroutine, Sequence
from random import Random
from typing import Any, TypeVar

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    InvalidTimestampError,
    KafkaError,
    MessageSizeTooLargeError,
    ProducerClosed,
    RecordListTooLargeError,
    RecordTooLargeError,
    UnsupportedForMessageFormatError,
)
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.producer.message_accumulator import BatchBuilder

from kronos_connectors._shared.client_errors import capture_aiokafka_errors
from kronos_connectors.kafka.checks import checks
from kronos_connectors.kafka.errors import explain
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import (
    candle_topic,
    deadletter_topic,
    forecast_topic,
    latest_topic,
    missing_topics_message,
    topics_for_record,
)
from kronos_stream.interfaces.diagnostics import Check
from kronos_stream.interfaces.sink import Record, Refusal, SinkLoginRefused, SinkUnavailable
from kronos_stream.market.clock import Clock
from kronos_stream.market.timeframe import Timeframe

_log = structlog.get_logger()
_T = TypeVar("_T")

_RECORD_ERRORS = (
    InvalidTimestampError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    RecordTooLargeError,
    UnsupportedForMessageFormatError,
)
"""Errors of records that a broker will never accept."""

_BATCH_BYTES = 512 * 1024  # half of the default limit of brokers
_RECORD_OVERHEAD = 64  # bytes of lengths and numbers around a record, at most
_REQUEST_TIMEOUT_MS = 10_000
_CLOSE_TIMEOUT_SECONDS = 2.0


class _PartitionBatch:
    """Records of one delivery for one partition, in order."""

    def __init__(self, topic: str, partition: int, *, compacted: bool) -> None:
        self.topic, self.partition = topic, partition
        self._compacted = compacted
        self.pending: deque[Record] = deque()
        self.one_by_one = 0
        """Number of next records to send singly, because one of them is refused."""

    def fill(self, batch: BatchBuilder) -> int:
        """Put the next records into ``batch``; returns their number."""
        count = 0
        for record in self.pending:
            added = batch.append(
                timestamp=record.created,
                key=record.key.encode(),
                # Compaction deletes the records of a key after one without a value.
                value=None if self._compacted and record.kind == "removal" else record.value,
                headers=list(record.headers),
            )
            if added is None:
                break
            count += 1
            if self.one_by_one:
                break
        return count

    def acknowledge(self, count: int) -> None:
        for _ in range(count):
            self.pending.popleft()
        self.one_by_one = max(0, self.one_by_one - count)

    def reject(self, count: int) -> Record | None:
        """Remove and return the refused record, or None if it is one of several."""
        if count > 1:
            self.one_by_one = count
            return None
        rejected = self.pending[0]
        self.acknowledge(1)
        return rejected


class KafkaSink:
    """Sink with one idempotent producer at a time, which is replaced after any failure."""

    name = "kafka"

    def __init__(self, options: KafkaOptions, required_topics: Collection[str]) -> None:
        """required_topics: topics that must exist at the start."""
        self._options = options
        self._required_topics = set(required_topics)
        self._existing_topics: set[str] = set()
        self._latest_topic = latest_topic(options.topic_prefix)
        self._partitioner = DefaultPartitioner()  # as in Kafka's own clients
        self._producer: AIOKafkaProducer | None = None
        self._client_errors = capture_aiokafka_errors()

    def checks(self) -> Sequence[Check]:
        return checks(self._options, self._required_topics)

    async def start(self) -> None:
        """Connect, and check that the topics exist."""
        await self._with_deadline(self._get_producer())

    async def deliver(self, records: Sequence[Record]) -> Sequence[Refusal]:
        refusals: dict[int, Refusal] = {}
        for record in records:
            if reason := self._rejection_reason(record):
                refusals[record.sequence] = Refusal(record, reason)
        if accepted := [record for record in records if record.sequence not in refusals]:
            refusals |= await self._with_deadline(self._send(accepted))
        return [refusals[sequence] for sequence in sorted(refusals)]

    async def close(self) -> None:
        """Close the producer; between deliveries, no record is pending."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await _force_close(producer)

    async def _with_deadline(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Return the result of ``work``; close the producer if it fails or is cancelled."""
        self._client_errors.clear()
        try:
            async with asyncio.timeout(self._options.delivery_seconds):
                return await work
        except Exception as error:
            await self.close()
            if isinstance(error, SinkUnavailable):
                raise
            if not isinstance(error, (KafkaError, OSError)):  # a timeout is an OSError, too
                _log.exception("unexpected failure of the kafka producer")
            late = f"no acknowledgement in {self._options.delivery_seconds:g} s"
            found = explain(error, self._client_errors, self._options, timeout_message=late)
            raise (SinkLoginRefused if found.permanent else SinkUnavailable)(str(found)) from error
        except BaseException:
            await self.close()
            raise

    def _rejection_reason(self, record: Record) -> str | None:
        size = _RECORD_OVERHEAD + len(record.key.encode()) + len(record.value)
        size += sum(_RECORD_OVERHEAD + len(name) + len(value) for name, value in record.headers)
        limit = self._options.max_record_bytes
        if size > limit:
            return f"{size:,} bytes, over the limit of {limit:,}"
        if not 0 <= record.created < 2**63:
            return f"{record.created} is not a valid timestamp"
        return None

    async def _get_producer(self) -> AIOKafkaProducer:
        if self._producer is not None:
            return self._producer
        options = self._options
        self._producer = producer = AIOKafkaProducer(
            **options.client_arguments(),
            enable_idempotence=True,
            acks="all",
            # No compression: gzip blocks the event loop for 3 ms per record, others need packages.
            max_batch_size=_BATCH_BYTES,
            max_request_size=max(_BATCH_BYTES, options.max_record_bytes) + _RECORD_OVERHEAD,
            request_timeout_ms=_REQUEST_TIMEOUT_MS,
        )
        await producer.start()
        cluster = await producer.client.fetch_all_metadata()
        self._existing_topics = self._required_topics & set(cluster.topics())
        if missing := self._required_topics - self._existing_topics:
            raise SinkUnavailable(missing_topics_message(missing))
        producer.client.set_topics(self._required_topics)
        _log.info("connected to kafka", brokers=len(cluster.brokers()))
        return producer

    async def _send(self, records: Sequence[Record]) -> dict[int, Refusal]:
        batches = await self._group_by_partition(records)
        refusals: dict[int, Refusal] = {}
        while batches:
            producer = await self._get_producer()
            if await self._send_batches(producer, batches, refusals):
                await self.close()  # its sequence numbers are ahead of the broker's
            batches = [batch for batch in batches if batch.pending]
        return refusals

    async def _group_by_partition(self, records: Sequence[Record]) -> list[_PartitionBatch]:
        prefix = self._options.topic_prefix
        routes = [
            (record, topic)
            for record in records
            for topic in topics_for_record(prefix, record.kind, record.key)
        ]
        self._required_topics |= {topic for _, topic in routes}
        if self._required_topics - self._existing_topics:
            await self.close()  # the next producer checks all topics again
        producer = await self._get_producer()
        batches: dict[tuple[str, int], _PartitionBatch] = {}
        for record, topic in routes:
            partitions = sorted(await producer.partitions_for(topic))
            place = topic, self._partitioner(record.key.encode(), partitions, None)
            if place not in batches:
                batches[place] = _PartitionBatch(*place, compacted=topic == self._latest_topic)
            batches[place].pending.append(record)
        return list(batches.values())

    async def _send_batches(
        self,
        producer: AIOKafkaProducer,
        batches: Sequence[_PartitionBatch],
        refusals: dict[int, Refusal],
    ) -> bool:
        """Send the next records of each partition, and wait for all; True if any was refused."""
        sent: list[tuple[_PartitionBatch, int, asyncio.Future[Any]]] = []
        try:
            for batch in batches:
                builder = producer.create_batch()
                count = batch.fill(builder)
                response = await producer.send_batch(
                    builder, batch.topic, partition=batch.partition
                )
                sent.append((batch, count, response))
            await asyncio.wait([response for _, _, response in sent])
        finally:
            for _, _, response in sent:
                response.cancel()  # no effect on those that are done
        refused = False
        failed: BaseException | None = None
        for batch, count, response in sent:
            error = response.exception()
            if error is None:
                batch.acknowledge(count)
            elif isinstance(error, _RECORD_ERRORS):
                refused = True
                if (record := batch.reject(count)) is not None:
                    refusals[record.sequence] = Refusal(record, f"refused by the broker: {error}")
            else:
                failed = error
        if failed is not None:
            raise failed
        return refused


async def _force_close(producer: AIOKafkaProducer) -> None:
    """End a producer and all its tasks; its own stop() waits for undeliverable records.

    Uses private attributes of aiokafka.
    """
    sender, client = producer._sender.sender_task, producer.client  # noqa: SLF001
    try:
        async with asyncio.timeout(_CLOSE_TIMEOUT_SECONDS):
            if sender is not None:
                sender.cancel()  # it still waits for its requests,
            await client.close()  # which fail now
            update = client._md_update_fut = client._md_update_fut or asyncio.Future()  # noqa: SLF001
            if not update.done():
                update.set_result(False)  # no task waits for new metadata any more
            if sender is not None:
                await asyncio.wait([sender])
            # Batches to be sent again are not counted as pending; failing them would raise.
            accumulator = producer._message_accumulator  # noqa: SLF001
            for waiting in accumulator._batches.values():  # noqa: SLF001
                accumulator._pending_batches.update(waiting)  # noqa: SLF001
            accumulator.fail_all(ProducerClosed())
            await producer.stop()
    except (KafkaError, OSError) as error:
        _log.warning("kafka producer not closed completely", error=repr(error))


def build_sink(options: KafkaOptions, _clock: Clock, _random: Random) -> KafkaSink:
    """A sink for forecasts; it connects at its start."""
    prefix = options.topic_prefix
    return KafkaSink(
        options, (forecast_topic(prefix), latest_topic(prefix), deadletter_topic(prefix))
    )


def build_relay(
    options: KafkaOptions, timeframes: Sequence[Timeframe], _clock: Clock, _random: Random
) -> KafkaSink:
    """A sink for candles; it connects at its start."""
    prefix = options.topic_prefix
    return KafkaSink(
        options, (deadletter_topic(prefix), *(candle_topic(prefix, one) for one in timeframes))
    )
