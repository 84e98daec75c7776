"""The Kafka feed on Apache Kafka: assignments, checkpoints, rebalances, invalid records."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from itertools import count
from random import Random
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from confluent_kafka import Producer

from kronos_connectors.kafka import group_consumer, group_session
from kronos_connectors.kafka.feed import KafkaFeed
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import candle_topic
from kronos_stream.interfaces.feed import (
    Checkpoint,
    FeedNeeds,
    FeedRecord,
    Partition,
    PartitionBounds,
    Unreadable,
)
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.candle_message import RelayedBar, encode_bar
from kronos_stream.market.clock import SystemClock
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from tests.support.apache_kafka import ApacheKafka

SECOND = Timeframe.parse("1s")
SERIES = Series.of("binance", "BTC/USDT", SECOND)


class RecordingHandler:
    """A partition handler that records its calls and commits every position."""

    def __init__(self, *, drain_seconds: float = 0.0, metadata: str = "") -> None:
        """metadata: of its checkpoints."""
        self.assignments: list[Collection[Partition]] = []
        self.start_positions: dict[Partition, PartitionBounds] = {}
        self.records: list[FeedRecord] = []
        self.positions: dict[Partition, int] = {}
        self._drain_seconds, self._metadata = drain_seconds, metadata
        self._committed: dict[Partition, Checkpoint] = {}

    def paused(self) -> Collection[Partition]:
        return ()

    def on_assigned(self, partitions: Collection[Partition]) -> None:
        self.assignments.append(list(partitions))

    def start_partition(self, partition: Partition, bounds: PartitionBounds) -> int:
        self.start_positions[partition] = bounds
        self.positions[partition] = (
            bounds.first if bounds.checkpoint is None else bounds.checkpoint.offset
        )
        return self.positions[partition]

    def on_records(
        self, partition: Partition, records: Iterable[tuple[int, FeedRecord]], next_offset: int
    ) -> None:
        if partition in self.positions:
            self.records += [record for _, record in records]
            self.positions[partition] = next_offset

    async def drain(self) -> None:
        await asyncio.sleep(self._drain_seconds)

    def on_revoked(self) -> None:
        self.positions.clear()

    def pending_checkpoints(self) -> Mapping[Partition, Checkpoint]:
        checkpoints = {
            partition: Checkpoint(offset, self._metadata)
            for partition, offset in self.positions.items()
        }
        return {
            partition: checkpoint
            for partition, checkpoint in checkpoints.items()
            if self._committed.get(partition) != checkpoint
        }

    def on_checkpointed(self, checkpoints: Mapping[Partition, Checkpoint]) -> None:
        self._committed |= checkpoints

    def on_lag(self, lags: Mapping[str, int]) -> None:
        self.lag = sum(lags.values())

    @property
    def bars(self) -> int:
        return sum(isinstance(record, RelayedBar) for record in self.records)


class CandleTopic:
    """A candle topic, with writers and feeds."""

    def __init__(self, kafka: ApacheKafka, prefix: str) -> None:
        self.options = KafkaOptions(bootstrap_servers=kafka.bootstrap, topic_prefix=prefix)
        self.topic = candle_topic(prefix, SECOND)
        self._bootstrap, self._written = kafka.bootstrap, defaultdict[int, int](int)

    async def create(self, partitions: int = 1) -> None:
        async with self._admin() as admin:
            await admin.create_topics([NewTopic(self.topic, partitions, 1)])

    async def delete(self) -> None:
        async with self._admin() as admin:
            await admin.delete_topics([self.topic])

    def write(self, bars: int = 1, partition: int = 0, *, transaction: str = "") -> None:
        settings: dict[str, Any] = {"bootstrap.servers": self._bootstrap}
        if transaction:
            settings["transactional.id"] = transaction
        producer = Producer(settings)
        if transaction:
            producer.init_transactions(30)
            producer.begin_transaction()
        for _ in range(bars):
            number = self._written[partition] = self._written[partition] + 1
            bar = Bar(Candle(1_000 * number, 1.0, 2.0, 0.5, 1.5, 3.0), received=1)
            value = encode_bar(SERIES, bar, history=False)
            producer.produce(self.topic, value, SERIES.name, partition=partition)
        if transaction:
            producer.commit_transaction(30)
        assert producer.flush(30) == 0

    def write_raw(self, key: str, value: bytes) -> None:
        producer = Producer({"bootstrap.servers": self._bootstrap})
        producer.produce(self.topic, value, key, partition=0)
        assert producer.flush(30) == 0

    @asynccontextmanager
    async def start_feed(self, handler: RecordingHandler) -> AsyncIterator[KafkaFeed]:
        needs = FeedNeeds([SECOND], 32)
        feed = KafkaFeed(self.options, needs, SystemClock(), Random(1))
        task = asyncio.create_task(feed.run(handler))
        try:
            yield feed
        finally:
            task.cancel()
            await asyncio.wait([task])
            await feed.close()

    @asynccontextmanager
    async def _admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        admin = AIOKafkaAdminClient(bootstrap_servers=self._bootstrap)
        await admin.start()
        try:
            yield admin
        finally:
            await admin.close()


@pytest.fixture
def candles(kafka: ApacheKafka, topic_prefix: str) -> CandleTopic:
    return CandleTopic(kafka, topic_prefix)


async def wait_until(condition: Callable[[], object], seconds: float = 300) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - no event is set for it
            await asyncio.sleep(0.05)


async def test_next_member_continues_at_the_checkpoint(candles: CandleTopic) -> None:
    await candles.create()
    candles.write(7)
    first, second = RecordingHandler(metadata="seven"), RecordingHandler()
    async with candles.start_feed(first) as feed:
        await wait_until(lambda: first.bars == 7)
        assert feed.problem == ""
        assert first.start_positions[Partition(candles.topic, 0)] == PartitionBounds(0, 7, 0, None)
    candles.write(3)
    async with candles.start_feed(second):
        await wait_until(lambda: second.bars == 3)
        assert second.start_positions[Partition(candles.topic, 0)].checkpoint == Checkpoint(
            7, "seven"
        )
        await wait_until(lambda: second.lag == 0)


async def test_member_without_partitions_has_no_problem(candles: CandleTopic) -> None:
    await candles.create(1)
    one, other = RecordingHandler(), RecordingHandler()
    async with candles.start_feed(one) as first:
        await wait_until(lambda: one.start_positions)
        async with candles.start_feed(other) as second:
            await wait_until(lambda: [] in (*one.assignments, *other.assignments))
            await wait_until(lambda: first.problem == second.problem == "")


async def test_slow_drain_is_not_taken_for_an_outage(
    candles: CandleTopic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_consumer, "_FETCH_TIMEOUT_SECONDS", 2.0)
    await candles.create(4)
    slow, new = RecordingHandler(drain_seconds=6.0), RecordingHandler()

    async def trade() -> None:
        while True:
            for partition in range(4):
                await asyncio.to_thread(candles.write, 1, partition)
            await asyncio.sleep(0.1)

    trading = asyncio.create_task(trade())
    try:
        async with candles.start_feed(slow):
            await wait_until(lambda: slow.bars)
            async with candles.start_feed(new):
                await wait_until(lambda: new.bars)
                await asyncio.sleep(3)
                assert len(slow.assignments) == 2, "one before and one after the rebalance"
                assert len(new.assignments) == 1
    finally:
        trading.cancel()
        await asyncio.wait([trading])


async def test_transaction_markers_are_skipped(candles: CandleTopic) -> None:
    await candles.create()
    candles.write(5, transaction=candles.topic)
    handler = RecordingHandler()
    async with candles.start_feed(handler):
        await wait_until(lambda: handler.positions.get(Partition(candles.topic, 0)) == 6)
        assert handler.bars == 5


async def test_invalid_records_are_reported_as_unreadable(candles: CandleTopic) -> None:
    await candles.create()
    ahead = Bar(Candle(4_102_444_800_000, 1.0, 2.0, 0.5, 1.5, 3.0), received=1)
    minute = Series.of("binance", "BTC/USDT", Timeframe.parse("1m"))
    bar = Bar(Candle(60_000, 1.0, 2.0, 0.5, 1.5, 3.0), received=1)
    for key, value in (
        (SERIES.name, encode_bar(SERIES, ahead, history=False)),
        (minute.name, encode_bar(minute, bar, history=False)),
        (SERIES.name, encode_bar(minute, bar, history=False)),
        (SERIES.name, b"not JSON"),
        ("\N{SNOWMAN}", b""),
    ):
        candles.write_raw(key, value)
    candles.write(1)
    handler = RecordingHandler()
    async with candles.start_feed(handler):
        await wait_until(lambda: handler.bars == 1)
    reasons = [record.reason for record in handler.records if isinstance(record, Unreadable)]
    assert len(reasons) == 5
    assert "after it was written" in reasons[0]
    assert "in the topic for 1s candles" in reasons[1]


async def test_commit_failures_are_reported(candles: CandleTopic) -> None:
    await candles.create()
    candles.write(1)
    handler = RecordingHandler(metadata="x" * 10_000)  # brokers accept 4,096
    async with candles.start_feed(handler) as feed:
        await wait_until(lambda: "cannot be committed" in feed.problem)


async def test_missing_topic_is_reported_and_read_once_created(
    candles: CandleTopic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_session, "_TOPIC_CHECK_SECONDS", 0.5)
    handler = RecordingHandler()
    async with candles.start_feed(handler) as feed:
        await wait_until(lambda: "topics create --candles 1s" in feed.problem)
        await candles.create()
        candles.write(2)
        await wait_until(lambda: handler.bars == 2)
        assert feed.problem == ""
        await candles.delete()
        await wait_until(lambda: "no topic" in feed.problem)
        await candles.create()
        await wait_until(lambda: feed.problem == "")


async def test_missing_committed_offsets_are_requested_again(
    candles: CandleTopic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the group would start as a new one."""
    await candles.create()
    candles.write(4)
    first, second = RecordingHandler(), RecordingHandler()
    async with candles.start_feed(first):
        await wait_until(lambda: first.bars == 4)
    list_offsets = AIOKafkaAdminClient.list_consumer_group_offsets
    calls = count(1)

    async def empty_at_first(self: AIOKafkaAdminClient, *arguments: Any, **named: Any) -> Any:
        return {} if next(calls) == 1 else await list_offsets(self, *arguments, **named)

    monkeypatch.setattr(AIOKafkaAdminClient, "list_consumer_group_offsets", empty_at_first)
    async with candles.start_feed(second):
        await wait_until(lambda: second.start_positions)
    assert next(calls) > 2
    assert second.start_positions[Partition(candles.topic, 0)].checkpoint == Checkpoint(4, "")


async def test_iterations_increase_without_a_broker(topic_prefix: str) -> None:
    options = KafkaOptions(bootstrap_servers="127.0.0.1:1", topic_prefix=topic_prefix)
    feed = KafkaFeed(options, FeedNeeds([SECOND], 32), SystemClock(), Random(1))
    task = asyncio.create_task(feed.run(RecordingHandler()))
    await wait_until(lambda: feed.iterations > 1)
    assert "connection refused" in feed.problem
    task.cancel()
    await asyncio.wait([task])
    await feed.close()
