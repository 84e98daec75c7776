"""Members of a group on Apache Kafka, with a reader that only keeps what it is told."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
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
    """A reader: what it was given, where it began, what it has read; and it notes all of it."""

    def __init__(self, *, hand_over: float = 0.0, text: str = "") -> None:
        """hand_over: seconds that it takes to give up. text: what it notes beside offsets."""
        self.assignments: list[Collection[Partition]] = []
        self.start_positions: dict[Partition, PartitionBounds] = {}
        self.records: list[FeedRecord] = []
        self.positions: dict[Partition, int] = {}
        self._hand_over, self._text = hand_over, text
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
            self.records += [told for _, told in records]
            self.positions[partition] = next_offset

    async def drain(self) -> None:
        await asyncio.sleep(self._hand_over)

    def on_revoked(self) -> None:
        self.positions.clear()

    def pending_checkpoints(self) -> Mapping[Partition, Checkpoint]:
        notes = {part: Checkpoint(offset, self._text) for part, offset in self.positions.items()}
        return {part: note for part, note in notes.items() if self._committed.get(part) != note}

    def on_checkpointed(self, checkpoints: Mapping[Partition, Checkpoint]) -> None:
        self._committed |= checkpoints

    def on_lag(self, lags: Mapping[str, int]) -> None:
        self.lag = sum(lags.values())

    @property
    def bars(self) -> int:
        return sum(isinstance(told, RelayedBar) for told in self.records)


class CandleTopic:
    """A topic of candles, and whoever reads it."""

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
        """A record as it is."""
        producer = Producer({"bootstrap.servers": self._bootstrap})
        producer.produce(self.topic, value, key, partition=0)
        assert producer.flush(30) == 0

    @asynccontextmanager
    async def start_feed(self, keeper: RecordingHandler) -> AsyncIterator[KafkaFeed]:
        needs = FeedNeeds([SECOND], 32)
        feed = KafkaFeed(self.options, needs, SystemClock(), Random(1))
        task = asyncio.create_task(feed.run(keeper))
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
def house(kafka: ApacheKafka, topic_prefix: str) -> CandleTopic:
    return CandleTopic(kafka, topic_prefix)


async def wait_until(happened: Callable[[], object], seconds: float = 300) -> None:
    async with asyncio.timeout(seconds):
        while not happened():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.05)


async def test_who_goes_on_begins_where_the_one_before_noted(house: CandleTopic) -> None:
    await house.create()
    house.write(7)
    first, second = RecordingHandler(text="seven"), RecordingHandler()
    async with house.start_feed(first) as feed:
        await wait_until(lambda: first.bars == 7)
        assert feed.problem == ""
        assert first.start_positions[Partition(house.topic, 0)] == PartitionBounds(0, 7, 0, None)
    house.write(3)
    async with house.start_feed(second):
        await wait_until(lambda: second.bars == 3)
        assert second.start_positions[Partition(house.topic, 0)].checkpoint == Checkpoint(
            7, "seven"
        )
        await wait_until(lambda: second.lag == 0)


async def test_a_member_without_a_share_is_fine(house: CandleTopic) -> None:
    await house.create(1)
    one, other = RecordingHandler(), RecordingHandler()
    async with house.start_feed(one) as first:
        await wait_until(lambda: one.start_positions)
        async with house.start_feed(other) as second:
            await wait_until(lambda: [] in (*one.assignments, *other.assignments))
            await wait_until(lambda: first.problem == second.problem == "")


async def test_a_slow_hand_over_is_no_dead_broker(
    house: CandleTopic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_consumer, "_FETCH_TIMEOUT_SECONDS", 2.0)
    await house.create(4)
    slow, new = RecordingHandler(hand_over=6.0), RecordingHandler()

    async def trade() -> None:
        while True:
            for partition in range(4):
                await asyncio.to_thread(house.write, 1, partition)
            await asyncio.sleep(0.1)

    trading = asyncio.create_task(trade())
    try:
        async with house.start_feed(slow):
            await wait_until(lambda: slow.bars)
            async with house.start_feed(new):
                await wait_until(lambda: new.bars)
                await asyncio.sleep(3)
                assert len(slow.assignments) == 2, "once alone, and once shared out"
                assert len(new.assignments) == 1
    finally:
        trading.cancel()
        await asyncio.wait([trading])


async def test_marks_of_transactions_are_passed_over(house: CandleTopic) -> None:
    await house.create()
    house.write(5, transaction=house.topic)
    keeper = RecordingHandler()
    async with house.start_feed(keeper):
        await wait_until(lambda: keeper.positions.get(Partition(house.topic, 0)) == 6)
        assert keeper.bars == 5


async def test_what_cannot_be_is_told_as_unreadable_and_passed_over(house: CandleTopic) -> None:
    await house.create()
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
        house.write_raw(key, value)
    house.write(1)
    keeper = RecordingHandler()
    async with house.start_feed(keeper):
        await wait_until(lambda: keeper.bars == 1)
    reasons = [told.reason for told in keeper.records if isinstance(told, Unreadable)]
    assert len(reasons) == 5
    assert "after it was written" in reasons[0]
    assert "among the series of 1s" in reasons[1]


async def test_what_cannot_be_committed_is_said(house: CandleTopic) -> None:
    await house.create()
    house.write(1)
    keeper = RecordingHandler(text="x" * 10_000)  # a broker takes 4,096
    async with house.start_feed(keeper) as feed:
        await wait_until(lambda: "cannot be committed" in feed.problem, 40)


async def test_a_topic_that_goes_is_said_and_read_again_when_it_comes(
    house: CandleTopic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_session, "_TOPIC_CHECK_SECONDS", 0.5)
    keeper = RecordingHandler()
    async with house.start_feed(keeper) as feed:
        await wait_until(lambda: "topics create --candles 1s" in feed.problem)
        await house.create()
        house.write(2)
        await wait_until(lambda: keeper.bars == 2)
        assert feed.problem == ""
        await house.delete()
        await wait_until(lambda: "no topic" in feed.problem)
        await house.create()
        await wait_until(lambda: feed.problem == "")


async def test_a_broker_that_does_not_tell_what_is_done_is_asked_again(
    house: CandleTopic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the group would be taken for a new one."""
    await house.create()
    house.write(4)
    first, second = RecordingHandler(), RecordingHandler()
    async with house.start_feed(first):
        await wait_until(lambda: first.bars == 4)
    really, asked = AIOKafkaAdminClient.list_consumer_group_offsets, []

    async def silent(self: AIOKafkaAdminClient, *arguments: Any, **named: Any) -> Any:
        asked.append(time.monotonic())
        return {} if len(asked) == 1 else await really(self, *arguments, **named)

    monkeypatch.setattr(AIOKafkaAdminClient, "list_consumer_group_offsets", silent)
    async with house.start_feed(second):
        await wait_until(lambda: second.start_positions)
    assert len(asked) > 1
    assert second.start_positions[Partition(house.topic, 0)].checkpoint == Checkpoint(4, "")


async def test_the_work_goes_on_turn_by_turn_also_without_a_broker(topic_prefix: str) -> None:
    options = KafkaOptions(bootstrap_servers="127.0.0.1:1", topic_prefix=topic_prefix)
    feed = KafkaFeed(options, FeedNeeds([SECOND], 32), SystemClock(), Random(1))
    task = asyncio.create_task(feed.run(RecordingHandler()))
    await wait_until(lambda: feed.iterations > 1)
    assert "nobody listens there" in feed.problem
    task.cancel()
    await asyncio.wait([task])
    await feed.close()
