"""The Kafka source on real brokers: history, live bars, outages, groups, error messages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.codec import has_lz4
from confluent_kafka import Producer

from kronos_connectors.kafka import SOURCE, group_consumer
from kronos_connectors.kafka.admin import create
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.source import KafkaSource
from kronos_connectors.kafka.topics import candle_topic, required_topics
from kronos_stream.interfaces.source import SourceCallbacks, SourceError
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.candle_message import encode_candle
from kronos_stream.market.clock import SystemClock
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.testing.broker import EmbeddedBroker
from tests.support.apache_kafka import ApacheKafka

STEP = 60_000
MINUTE, FIVE = Timeframe(1, "m"), Timeframe(5, "m")
BTC, ETH = (Series.of("kafka", f"{base}/USDT", MINUTE) for base in ("BTC", "ETH"))
BTC_FIVE = Series.of("kafka", "BTC/USDT", FIVE)


@dataclass
class RunningSource:
    """A running source, and what it has passed on."""

    source: KafkaSource
    updates: list[Update] = field(default_factory=list)
    rejected: list[tuple[Series | None, str, bytes]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def bars(self, series: Series = BTC) -> list[float]:
        """Close prices, which identify the bars."""
        return [one.candle.close for one in self.updates if one.series == series]

    async def history(self, series: Series = BTC) -> list[float]:
        return [one.close for one in await self.source.history(series, 0, 2**60)]


def _source(bootstrap: str, prefix: str, venue: str = "kafka", **options: Any) -> KafkaSource:
    settings = KafkaOptions(bootstrap_servers=bootstrap, topic_prefix=prefix, **options)
    source = SOURCE.build(venue, settings, SystemClock(), Random(0))
    assert isinstance(source, KafkaSource)
    return source


@asynccontextmanager
async def _run_source(
    bootstrap: str, prefix: str, *series: Series, **options: Any
) -> AsyncIterator[RunningSource]:
    running = RunningSource(_source(bootstrap, prefix, **options))
    running.source.subscribe(series or (BTC,))
    callbacks = SourceCallbacks(
        running.updates.append,
        lambda series, reason, raw: running.rejected.append((series, reason, raw)),
        running.events.append,
    )
    task = asyncio.create_task(running.source.run(callbacks))
    try:
        yield running
    finally:
        task.cancel()
        await asyncio.wait([task])
        await running.source.close()
    assert task.cancelled()


async def _create(bootstrap: str, prefix: str, *timeframes: Timeframe, **options: Any) -> None:
    settings = KafkaOptions(
        bootstrap_servers=bootstrap, topic_prefix=prefix, **{"partitions": 4, **options}
    )
    await create(settings, required_topics(settings, timeframes or (MINUTE,)))


def _bar(number: int, series: Series = BTC) -> bytes:
    """The bar that closed ``1000 - number`` bars ago, with close price ``number``."""
    newest = time.time_ns() // 1_000_000 // STEP - 1
    price = float(number)
    opened = (newest - 1_000 + number) * STEP
    return encode_candle(series, Candle(opened, price, price, price, price, 1.0))


async def _produce(
    bootstrap: str,
    prefix: str,
    numbers: Iterable[int],
    series: Series = BTC,
    *,
    values: Iterable[bytes] = (),
    key: bool = True,
    **connection: Any,
) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, **connection)
    await producer.start()
    try:
        topic = candle_topic(prefix, series.timeframe)
        for value in [*(_bar(number, series) for number in numbers), *values]:
            await producer.send_and_wait(topic, value, series.name.encode() if key else None)
    finally:
        await producer.stop()


async def _wait_until(condition: Callable[[], object], seconds: float = 300.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - no event is set for it
            await asyncio.sleep(0.02)


@pytest.fixture(params=["embedded", "apache"])
async def bootstrap(request: pytest.FixtureRequest, topic_prefix: str) -> AsyncIterator[str]:
    """An embedded or a real broker, with the topic for 1m candles."""
    if request.param == "embedded":
        with EmbeddedBroker([candle_topic(topic_prefix, MINUTE)]) as broker:
            yield broker.bootstrap
    else:
        kafka: ApacheKafka = request.getfixturevalue("kafka")
        await _create(kafka.bootstrap, topic_prefix)
        yield kafka.bootstrap


async def test_topic_provides_history_and_live_bars(bootstrap: str, topic_prefix: str) -> None:
    await _produce(bootstrap, topic_prefix, range(1, 500))
    await _produce(bootstrap, topic_prefix, range(1, 9), ETH)
    async with _run_source(bootstrap, topic_prefix) as one:
        assert await one.source.unsupported([BTC, ETH]) == {}
        assert await one.history() == list(map(float, range(1, 500)))
        await _produce(bootstrap, topic_prefix, [500, 501, 501, 400])
        await _produce(bootstrap, topic_prefix, [502], key=False)
        await _produce(bootstrap, topic_prefix, [9], ETH)
        await _produce(bootstrap, topic_prefix, [503], values=[b"{", b"[]"])
        await _wait_until(lambda: len(one.updates) == 6 and len(one.rejected) == 2)
        assert sorted(one.bars()) == [400, 500, 501, 501, 502, 503]
        keyed = [close for close in one.bars() if close <= 501]
        assert keyed == [500, 501, 501, 400]  # in order; partitions have none between them
        assert len(await one.history()) == 503
        assert one.events == ["connected"]
        assert [series for series, _, _ in one.rejected] == [BTC, BTC]
    # After a restart, rejected records are not rejected again, and the history is available.
    async with _run_source(bootstrap, topic_prefix) as one:
        assert len(await one.history()) == 503
        await _produce(bootstrap, topic_prefix, [504])
        await _wait_until(lambda: one.updates)
        assert one.bars() == [504]
        assert one.rejected == []
    assert len(asyncio.all_tasks()) == 1


async def test_subscription_changes_while_running(kafka: ApacheKafka, topic_prefix: str) -> None:
    where = kafka.bootstrap, topic_prefix
    await _create(*where, MINUTE, FIVE)
    for series in (BTC, ETH, BTC_FIVE):
        await _produce(*where, range(1, 200), series)
    async with _run_source(*where, BTC) as one:
        assert len(await one.history()) == 199
        produced = asyncio.create_task(_produce_slowly(where, BTC, range(200, 300)))
        one.source.subscribe([BTC, ETH])
        assert len(await one.history(ETH)) == 199
        one.source.subscribe([BTC, ETH, BTC_FIVE])
        assert len(await one.history(BTC_FIVE)) == 199
        await _produce(*where, [200], BTC_FIVE)
        one.source.subscribe([BTC, BTC_FIVE])
        await _wait_until(lambda: one.bars(BTC_FIVE) == [200.0])
        one.source.subscribe([])
        await asyncio.sleep(1)  # the consumer may leave the group
        one.source.subscribe([BTC])
        await produced
        await _wait_until(lambda: one.bars()[-1:] == [299.0])
        # No bar is missing or repeated.
        assert one.bars() == list(map(float, range(200, 300)))
        assert await one.history() == list(map(float, range(1, 300)))
    assert len(asyncio.all_tasks()) == 1


async def _produce_slowly(where: tuple[str, str], series: Series, numbers: Iterable[int]) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=where[0])
    await producer.start()
    try:
        for number in numbers:
            topic = candle_topic(where[1], series.timeframe)
            await producer.send_and_wait(topic, _bar(number, series), series.name.encode())
            await asyncio.sleep(0.05)
    finally:
        await producer.stop()


async def test_committed_offsets_show_the_progress(kafka: ApacheKafka, topic_prefix: str) -> None:
    await _create(kafka.bootstrap, topic_prefix, partitions=1)
    await _produce(kafka.bootstrap, topic_prefix, range(1, 31))
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    for group, name in (("", f"{topic_prefix}-ingest"), ("mine", "mine")):
        async with _run_source(kafka.bootstrap, topic_prefix, group=group) as one:
            assert len(await one.history()) == 30
        committed = await admin.list_consumer_group_offsets(name)
        assert committed[TopicPartition(candle_topic(topic_prefix, MINUTE), 0)].offset == 30
    await admin.close()
    assert _source("x:1", topic_prefix, "kafka.us")._group.name == f"{topic_prefix}-ingest.us"


async def test_members_of_a_group_know_which_series_they_lack(
    kafka: ApacheKafka, topic_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _create(kafka.bootstrap, topic_prefix, partitions=2)
    names = [Series.of("kafka", f"S{i}/USDT", MINUTE) for i in range(8)]
    for series in names:
        await _produce(kafka.bootstrap, topic_prefix, [1], series)
    async with _run_source(kafka.bootstrap, topic_prefix, *names) as first:
        assert [await first.history(series) for series in names] == [[1.0]] * 8
        async with _run_source(kafka.bootstrap, topic_prefix, *names) as second:
            states = [member.source._topic_state for member in (first, second)]
            await _wait_until(
                lambda: all(
                    state.shared_topics and state._assigned == state._active.keys()
                    for state in states
                )
            )
            monkeypatch.setattr("kronos_connectors.kafka.source._HISTORY_TIMEOUT_SECONDS", 0.5)
            lacking = [[await _lacks(member, name) for member in (first, second)] for name in names]
            # The later member has read only its own partition.
            assert sorted(map(sum, lacking)) == [1] * 8
            assert {lacks for _, lacks in lacking} == {True, False}
        monkeypatch.undo()
        await _wait_until(lambda: not first.source._topic_state.shared_topics)
        await _produce(kafka.bootstrap, topic_prefix, [2], names[0])
        await _wait_until(lambda: first.bars(names[0]) == [2.0])
        assert [len(await first.history(series)) for series in names] == [2] + [1] * 7


async def _lacks(member: RunningSource, series: Series) -> bool:
    try:
        return await member.history(series) != [1.0]
    except SourceError as error:
        return "1 of its 2 partitions" in str(error)


@pytest.mark.parametrize("outage", [1.0, 5.0])
async def test_outage_loses_no_bar(
    kafka_jars: Path, tmp_path: Path, outage: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_consumer, "_FETCH_TIMEOUT_SECONDS", 2.0)
    with ApacheKafka(kafka_jars, tmp_path) as kafka:
        await _create(kafka.bootstrap, "kronos")
        await _produce(kafka.bootstrap, "kronos", range(1, 100))
        async with _run_source(kafka.bootstrap, "kronos") as one:
            assert len(await one.history()) == 99
            await _produce(kafka.bootstrap, "kronos", range(100, 110))
            await _wait_until(lambda: len(one.updates) == 10)
            await asyncio.to_thread(kafka.kill)
            await asyncio.sleep(outage)
            if outage > 2:
                await _wait_until(lambda: "lost" in one.events)
                monkeypatch.setattr("kronos_connectors.kafka.source._HISTORY_TIMEOUT_SECONDS", 0.1)
                with pytest.raises(SourceError, match=r"Connect|connect|no answer"):
                    await one.history()
                monkeypatch.undo()
            await asyncio.to_thread(kafka.start)
            await _produce(kafka.bootstrap, "kronos", range(110, 120))
            await _wait_until(lambda: len(one.updates) == 20)
            assert one.bars() == list(map(float, range(100, 120)))
            assert len(await one.history()) == 119
    assert len(asyncio.all_tasks()) == 1


async def test_close_is_bounded_if_the_broker_hangs(kafka_jars: Path, tmp_path: Path) -> None:
    with ApacheKafka(kafka_jars, tmp_path) as kafka:
        await _create(kafka.bootstrap, "kronos")
        async with _run_source(kafka.bootstrap, "kronos") as one:
            assert await one.history() == []
            await _produce(kafka.bootstrap, "kronos", [1])
            await _wait_until(lambda: one.updates)
            kafka.freeze()
            began = time.monotonic()
        assert time.monotonic() - began < 60
        kafka.thaw()
    assert len(asyncio.all_tasks()) == 1


async def test_connection_problems_are_reported_with_remedies(
    kafka_jars: Path, tmp_path: Path
) -> None:
    login = {"security_protocol": "SASL_PLAINTEXT", "sasl_username": "kronos"}
    right, wrong = ({**login, "sasl_password": password} for password in ("right", "hunter2"))
    with ApacheKafka(kafka_jars, tmp_path, users={"kronos": "right"}) as kafka:
        await _create(kafka.bootstrap, "kronos", **right)
        found = await _source(kafka.bootstrap, "kronos", **right).unsupported([BTC, BTC_FIVE])
        assert list(found) == [BTC_FIVE]
        assert "no topic kronos.candles.5m.v1" in found[BTC_FIVE]
        assert "kronos-stream topics create --candles 5m" in found[BTC_FIVE]
        with pytest.raises(SourceError, match="KAFKA__SASL_PASSWORD") as refused:
            await _source(kafka.bootstrap, "kronos", **wrong).unsupported([BTC])
        assert "hunter2" not in str(refused.value)
        async with _run_source(kafka.bootstrap, "kronos", **wrong) as one:
            await _wait_until(lambda: "lost" in one.events)
            assert "SASL_PASSWORD" in one.source._session.failure
        async with _run_source(kafka.bootstrap, "kronos", **right) as one:
            assert await one.history() == []
    with pytest.raises(SourceError, match=r"127\.0\.0\.1:1"):
        await _source("127.0.0.1:1", "kronos").unsupported([BTC])
    assert len(asyncio.all_tasks()) == 1


async def test_missing_decompressor_is_reported_with_the_remedy() -> None:
    with EmbeddedBroker([candle_topic("kronos", MINUTE)]) as broker:
        async with _run_source(broker.bootstrap, "kronos") as one:
            assert await one.history() == []
            packed = Producer({"bootstrap.servers": broker.bootstrap, "compression.type": "lz4"})
            for _ in range(50):  # fewer are not compressed
                packed.produce(candle_topic("kronos", MINUTE), _bar(1), BTC.name)
            await asyncio.to_thread(packed.flush)
            if has_lz4():
                await _wait_until(lambda: len(one.updates) == 50)
            else:
                await _wait_until(lambda: "lost" in one.events)
                assert "pip install 'aiokafka[all]'" in one.source._session.failure
