"""Records to Kafka: acknowledged by all in-sync replicas, in order per key, or given back.

aiokafka batches by itself, but then nobody knows which record a broker refused, and whatever
followed it in the same partition fails with OutOfOrderSequenceNumber or, worse, arrives before it.
So the batches are made here: one per partition at a time, the next one once it is acknowledged.
A refused batch is sent again record by record, by a new producer, whose sequence starts afresh.
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
    timeframe_of,
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
"""What a broker says of a record that it will never take."""

_BATCH_BYTES = 512 * 1024  # half of what a broker takes unless told otherwise
_RECORD_OVERHEAD = 64  # bytes of lengths and numbers around a record, at most
_REQUEST_TIMEOUT_MS = 10_000
_CLOSE_TIMEOUT_SECONDS = 2.0


class _PartitionBatch:
    """What goes to one partition, in order."""

    def __init__(self, topic: str, partition: int, *, compacted: bool) -> None:
        self.topic, self.partition = topic, partition
        self._compacted = compacted
        self.pending: deque[Record] = deque()
        self.one_by_one = 0
        """How many of the next are to be sent alone, for one among them is refused."""

    def fill(self, batch: BatchBuilder) -> int:
        """Put the next records into ``batch``: how many."""
        count = 0
        for record in self.pending:
            added = batch.append(
                timestamp=record.created,
                key=record.key.encode(),
                # Without a value, compaction takes the key's records away.
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
        """The culprit, if it was alone."""
        if count > 1:
            self.one_by_one = count
            return None
        culprit = self.pending[0]
        self.acknowledge(1)
        return culprit


class KafkaSink:
    """One idempotent producer at a time, replaced whenever there is doubt about it."""

    name = "kafka"

    def __init__(self, options: KafkaOptions, required_topics: Collection[str]) -> None:
        """needed: topics that must be there from the start."""
        self._options = options
        self._required_topics = set(required_topics)
        """Topics that something went to, or is to go to."""
        self._existing_topics: set[str] = set()
        """Those of them that the brokers have."""
        self._latest_topic = latest_topic(options.topic_prefix)
        self._partitioner = DefaultPartitioner()  # the one of Kafka's own clients
        self._producer: AIOKafkaProducer | None = None
        self._client_errors = capture_aiokafka_errors()

    def checks(self) -> Sequence[Check]:
        return checks(self._options, self._required_topics)

    async def start(self) -> None:
        """Connect, and see that the topics are there."""
        await self._with_deadline(self._get_producer())

    async def deliver(self, records: Sequence[Record]) -> Sequence[Refusal]:
        refusals: dict[int, Refusal] = {}
        for record in records:
            if reason := self._rejection_reason(record):
                refusals[record.sequence] = Refusal(record, reason)
        fit = [record for record in records if record.sequence not in refusals]
        if fit:
            refusals |= await self._with_deadline(self._send(fit))
        return [refusals[sequence] for sequence in sorted(refusals)]

    async def close(self) -> None:
        """Nothing is on its way between deliveries, so nothing is flushed."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await _force_close(producer)

    async def _with_deadline(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of ``work``; if it fails or is cancelled, the producer goes with it.

        Whatever aiokafka raises means doubt; what is not made for users is logged in full.
        """
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
            silence = f"no acknowledgement in {self._options.delivery_seconds:g} s"
            found = explain(error, self._client_errors, self._options, timeout_message=silence)
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
            return f"{record.created} is no timestamp"
        return None

    async def _get_producer(self) -> AIOKafkaProducer:
        if self._producer is not None:
            return self._producer
        options = self._options
        self._producer = producer = AIOKafkaProducer(
            **options.client_arguments(),
            enable_idempotence=True,
            acks="all",
            # Uncompressed: gzip takes 3 ms of the event loop per record, and the rest are extras.
            max_batch_size=_BATCH_BYTES,
            max_request_size=max(_BATCH_BYTES, options.max_record_bytes) + _RECORD_OVERHEAD,
            request_timeout_ms=_REQUEST_TIMEOUT_MS,
        )
        await producer.start()
        cluster = await producer.client.fetch_all_metadata()
        self._existing_topics = self._required_topics & set(cluster.topics())
        if missing := sorted(self._required_topics - self._existing_topics):
            raise SinkUnavailable(
                f"no topic {', '.join(missing)}, or no right to see it; "
                f"to create what is missing: kronos-stream topics create{_candles_option(missing)}"
            )
        producer.client.set_topics(self._required_topics)
        _log.info("connected to kafka", brokers=len(cluster.brokers()))
        return producer

    async def _send(self, records: Sequence[Record]) -> dict[int, Refusal]:
        lanes = await self._group_by_partition(records)
        refusals: dict[int, Refusal] = {}
        while lanes:
            producer = await self._get_producer()
            if await self._send_batches(producer, lanes, refusals):
                await self.close()  # its sequence numbers have run ahead of the broker's
            lanes = [lane for lane in lanes if lane.pending]
        return refusals

    async def _group_by_partition(self, records: Sequence[Record]) -> list[_PartitionBatch]:
        prefix = self._options.topic_prefix
        goals = [(record, topics_for_record(prefix, record.kind, record.key)) for record in records]
        self._required_topics |= {topic for _, topics in goals for topic in topics}
        if self._required_topics - self._existing_topics:
            await self.close()  # the next one looks for all topics again
        producer = await self._get_producer()
        lanes: dict[tuple[str, int], _PartitionBatch] = {}
        for record, topics in goals:
            for topic in topics:
                partitions = sorted(await producer.partitions_for(topic))
                place = topic, self._partitioner(record.key.encode(), partitions, None)
                lane = lanes.setdefault(
                    place, _PartitionBatch(*place, compacted=topic == self._latest_topic)
                )
                lane.pending.append(record)
        return list(lanes.values())

    async def _send_batches(
        self,
        producer: AIOKafkaProducer,
        batches: Sequence[_PartitionBatch],
        refusals: dict[int, Refusal],
    ) -> bool:
        """Send one batch per lane and wait for all: True if any was refused."""
        sent: list[tuple[_PartitionBatch, int, asyncio.Future[Any]]] = []
        try:
            for lane in batches:
                batch = producer.create_batch()
                count = lane.fill(batch)
                answer = await producer.send_batch(batch, lane.topic, partition=lane.partition)
                sent.append((lane, count, answer))
            await asyncio.wait([answer for _, _, answer in sent])
        finally:
            for _, _, answer in sent:
                answer.cancel()  # if we leave early; nobody will ask for it then
        refused = False
        failed: BaseException | None = None
        for lane, count, answer in sent:
            error = answer.exception()
            if error is None:
                lane.acknowledge(count)
            elif isinstance(error, _RECORD_ERRORS):
                refused = True
                if (culprit := lane.reject(count)) is not None:
                    refusals[culprit.sequence] = Refusal(culprit, f"refused by the broker: {error}")
            else:
                failed = error
        if failed is not None:
            raise failed
        return refused


async def _force_close(producer: AIOKafkaProducer) -> None:
    """End a producer at once; its own stop() waits for what can no longer be delivered.

    Hence the look inside: no task of it may stay behind, waiting for ever.
    """
    sender, client = producer._sender.sender_task, producer.client  # noqa: SLF001
    try:
        async with asyncio.timeout(_CLOSE_TIMEOUT_SECONDS):
            if sender is not None:
                sender.cancel()  # it now waits for its requests,
            await client.close()  # which this ends;
            update = client._md_update_fut = client._md_update_fut or asyncio.Future()  # noqa: SLF001
            if not update.done():
                update.set_result(False)  # nor will there be new metadata to wait for.
            if sender is not None:
                await asyncio.wait([sender])
            # Batches that were sent and put back it does not count among those under way, and then
            # their end would be an error of its own.
            accumulator = producer._message_accumulator  # noqa: SLF001
            for waiting in accumulator._batches.values():  # noqa: SLF001
                accumulator._pending_batches.update(waiting)  # noqa: SLF001
            accumulator.fail_all(ProducerClosed())
            await producer.stop()
    except (KafkaError, OSError) as error:
        _log.warning("kafka producer not closed in good order", error=repr(error))


def _candles_option(topics: Sequence[str]) -> str:
    """The option for those topics among ``topics`` that are candles'."""
    found = [timeframe for topic in topics if (timeframe := timeframe_of(topic))]
    return f" --candles {','.join(found)}" if found else ""


def build_sink(options: KafkaOptions, _clock: Clock, _random: Random) -> KafkaSink:
    """A sink of forecasts; it connects at its start."""
    prefix = options.topic_prefix
    return KafkaSink(
        options, (forecast_topic(prefix), latest_topic(prefix), deadletter_topic(prefix))
    )


def build_relay(
    options: KafkaOptions, timeframes: Sequence[Timeframe], _clock: Clock, _random: Random
) -> KafkaSink:
    """A sink of candles; it connects at its start."""
    prefix = options.topic_prefix
    return KafkaSink(
        options, (deadletter_topic(prefix), *(candle_topic(prefix, one) for one in timeframes))
    )
