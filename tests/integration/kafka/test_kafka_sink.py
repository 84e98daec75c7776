"""The Kafka sink: order, refused records, hanging brokers, outages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord

from kronos_connectors.kafka import SINK
from kronos_connectors.kafka.admin import create
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import (
    deadletter_topic,
    forecast_topic,
    latest_topic,
    required_topics,
)
from kronos_stream.interfaces.sink import Record, RecordKind, Refusal, Sink, SinkUnavailable
from kronos_stream.market.clock import SystemClock
from kronos_stream.testing.broker import EmbeddedBroker
from tests.support.apache_kafka import ApacheKafka
from tests.support.processes import resident_mib

SERIES = 20
_SIZE = 6_000


def _record(
    sequence: int,
    *,
    series: int | None = None,
    size: int = _SIZE,
    kind: RecordKind = "forecast",
    ahead_ms: int = 0,
) -> Record:
    value = b"%d " % sequence
    key = f"binance:S{sequence % SERIES if series is None else series}/USDT:1s"
    created = time.time_ns() // 1_000_000 + ahead_ms
    return Record(
        sequence, kind, key, value.ljust(size, b"."), (("ce_id", b"%d" % sequence),), created
    )


def _sequences(records: Sequence[Any]) -> list[int]:
    return [int(record.value.split()[0]) for record in records]


@asynccontextmanager
async def _sink(bootstrap: str, prefix: str, **options: Any) -> AsyncIterator[Sink]:
    settings = KafkaOptions(bootstrap_servers=bootstrap, topic_prefix=prefix, **options)
    sink = SINK.build(settings, SystemClock(), Random(0))
    try:
        yield sink
    finally:
        await sink.close()


async def _create(bootstrap: str, prefix: str, **options: Any) -> None:
    settings = KafkaOptions(
        bootstrap_servers=bootstrap, topic_prefix=prefix, **{"partitions": 4, **options}
    )
    await create(settings, required_topics(settings))


async def _read(bootstrap: str, topic: str) -> list[ConsumerRecord]:
    """All records of a topic, partition by partition."""
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest", enable_auto_commit=False
    )
    await consumer.start()
    try:
        ends = await consumer.end_offsets(consumer.assignment())
        records: list[ConsumerRecord] = []
        async with asyncio.timeout(300):
            while any([await consumer.position(place) < end for place, end in ends.items()]):
                for batch in (await consumer.getmany(timeout_ms=200)).values():
                    records += batch
        return records
    finally:
        await consumer.stop()


async def _deliver_with_retries(sink: Sink, records: Sequence[Record]) -> list[Refusal]:
    """Deliver until the sink has accepted the records, as the outbox does."""
    async with asyncio.timeout(300):
        while True:
            try:
                return list(await sink.deliver(records))
            except SinkUnavailable:
                await asyncio.sleep(0.2)


def _in_order(records: Sequence[ConsumerRecord], expected: Sequence[int]) -> None:
    """Check that no record is missing, and that first occurrences are in order per series."""
    first: dict[bytes, list[int]] = {}
    seen: set[int] = set()
    for record, sequence in zip(records, _sequences(records), strict=True):
        if sequence not in seen:
            seen.add(sequence)
            first.setdefault(record.key, []).append(sequence)
    assert seen == set(expected)
    assert all(sequences == sorted(sequences) for sequences in first.values())


@pytest.fixture(params=["embedded", "apache"])
async def bootstrap(request: pytest.FixtureRequest, topic_prefix: str) -> AsyncIterator[str]:
    """An embedded or a real broker with the topics."""
    if request.param == "embedded":
        topics = [one(topic_prefix) for one in (forecast_topic, latest_topic, deadletter_topic)]
        with EmbeddedBroker(topics) as broker:
            yield broker.bootstrap
    else:
        kafka: ApacheKafka = request.getfixturevalue("kafka")
        await _create(kafka.bootstrap, topic_prefix)
        yield kafka.bootstrap


async def test_records_arrive_unchanged_and_in_order(bootstrap: str, topic_prefix: str) -> None:
    records = [_record(i) for i in range(200)]
    dead_letters = [_record(i, kind="deadletter") for i in range(200, 203)]
    async with _sink(bootstrap, topic_prefix) as sink:
        await sink.start()
        for first in range(0, 200, 50):
            assert not await sink.deliver(records[first : first + 50])
        assert not await sink.deliver([])
        assert not await sink.deliver(dead_letters)
    for topic in (forecast_topic(topic_prefix), latest_topic(topic_prefix)):
        arrived = await _read(bootstrap, topic)
        assert sorted(_sequences(arrived)) == list(range(200))
        _in_order(arrived, range(200))
        for got in arrived:
            sent = records[_sequences([got])[0]]
            assert (got.key.decode(), got.value) == (sent.key, sent.value)
            assert (got.headers, got.timestamp) == (sent.headers, sent.created)
    letters = await _read(bootstrap, deadletter_topic(topic_prefix))
    assert sorted(_sequences(letters)) == [200, 201, 202]


async def test_refused_records_do_not_block_others(kafka: ApacheKafka, topic_prefix: str) -> None:
    await _create(kafka.bootstrap, topic_prefix)
    big, hour = 1_500_000, 3_600_000
    invalid = {
        7: _record(7, size=big),  # over the broker's limit
        30: _record(30, size=5_000_000),  # over the limit of the sink
        31: _record(31, ahead_ms=2 * hour),  # Kafka accepts one hour
        32: _record(32, ahead_ms=-3_000 * 365 * 24 * hour),  # before 1970
        150: _record(150, size=big),
        151: _record(151, ahead_ms=2 * hour),
    }
    records = [invalid.get(i, _record(i)) for i in range(400)]
    async with _sink(kafka.bootstrap, topic_prefix, max_record_bytes=4_000_000) as sink:
        began = time.monotonic()
        refusals = await sink.deliver(records)
        assert time.monotonic() - began < 60
        assert {refusal.record.sequence for refusal in refusals} == set(invalid)
        assert all(refusal.reason for refusal in refusals)
        assert not await sink.deliver([_record(i) for i in range(400, 440)])
    arrived = await _read(kafka.bootstrap, forecast_topic(topic_prefix))
    assert len(arrived) == 440 - len(invalid)  # without repetition
    _in_order(arrived, sorted(set(range(440)) - set(invalid)))


async def test_missing_topics_are_reported_with_the_remedy(
    kafka: ApacheKafka, topic_prefix: str
) -> None:
    async with _sink(kafka.bootstrap, topic_prefix) as sink:
        with pytest.raises(SinkUnavailable, match=r"forecasts\.v1.*kronos-stream topics create"):
            await sink.start()
        await _create(kafka.bootstrap, topic_prefix)
        await sink.start()
        assert not await sink.deliver([_record(0)])


async def test_unreachable_broker_is_reported_with_its_address() -> None:
    async with _sink("127.0.0.1:1", "kronos") as sink:
        with pytest.raises(SinkUnavailable, match=r"127\.0\.0\.1:1.*[Cc]onnect"):
            await sink.start()
        with pytest.raises(SinkUnavailable):
            await sink.deliver([_record(0)])
    assert len(asyncio.all_tasks()) == 1


async def test_refused_login_is_reported(kafka_jars: Path, tmp_path: Path) -> None:
    login = {"security_protocol": "SASL_PLAINTEXT", "sasl_username": "kronos"}
    right, wrong = ({**login, "sasl_password": password} for password in ("right", "wrong"))
    with ApacheKafka(kafka_jars, tmp_path, users={"kronos": "right"}) as kafka:
        await _create(kafka.bootstrap, "kronos", **right)
        async with _sink(kafka.bootstrap, "kronos", **wrong) as sink:
            with pytest.raises(SinkUnavailable, match="Authentication failed") as refused:
                await sink.start()
            assert "wrong" not in str(refused.value)
        async with _sink(kafka.bootstrap, "kronos", **right) as sink:
            assert not await sink.deliver([_record(0)])


async def test_delivery_and_close_are_bounded_if_the_broker_hangs(
    kafka_jars: Path, tmp_path: Path
) -> None:
    with ApacheKafka(kafka_jars, tmp_path) as kafka:
        await _create(kafka.bootstrap, "kronos")
        async with _sink(kafka.bootstrap, "kronos", delivery_seconds=2) as sink:
            await sink.start()
            kafka.freeze()
            for _ in range(2):
                began = time.monotonic()
                with pytest.raises(SinkUnavailable, match="2 s"):
                    await sink.deliver([_record(0)])
                assert time.monotonic() - began < 60
            kafka.thaw()
            assert not await _deliver_with_retries(sink, [_record(0)])
            kafka.freeze()
            began = time.monotonic()
            await sink.close()
            assert time.monotonic() - began < 60
            kafka.thaw()

            # A cancelled delivery, as at the end of the grace period of a shutdown.
            delivery = asyncio.create_task(sink.deliver([_record(i) for i in range(1, 100)]))
            await asyncio.sleep(0)
            delivery.cancel()
            with pytest.raises(asyncio.CancelledError):
                await delivery

            assert not await _deliver_with_retries(sink, [_record(i) for i in range(100)])
        _in_order(await _read(kafka.bootstrap, forecast_topic("kronos")), range(100))
    assert len(asyncio.all_tasks()) == 1


async def _deliver_during(
    kafka: ApacheKafka, seconds: float, trouble: Callable[[], None], **options: Any
) -> float:
    """Deliver 20 records ten times a second during ``trouble``; returns the longest delivery."""
    sequence, longest, memory = 0, 0.0, resident_mib()
    async with _sink(kafka.bootstrap, "kronos", **options) as sink:
        assert not await _deliver_with_retries(sink, [_record(i) for i in range(SERIES)])
        sequence += SERIES
        trouble_task = asyncio.create_task(asyncio.to_thread(trouble))
        began = time.monotonic()
        while time.monotonic() - began < seconds or not trouble_task.done():
            batch = [_record(sequence + i) for i in range(SERIES)]
            sequence += SERIES
            started = time.monotonic()
            assert not await _deliver_with_retries(sink, batch)
            longest = max(longest, time.monotonic() - started)
            await asyncio.sleep(0.1)
    await trouble_task
    assert resident_mib() - memory < 32
    for topic in (forecast_topic("kronos"), latest_topic("kronos")):
        _in_order(await _read(kafka.bootstrap, topic), range(sequence))
    assert len(asyncio.all_tasks()) == 1
    return longest


@pytest.mark.parametrize(
    "outage",
    [3.0, pytest.param(10.0, marks=pytest.mark.soak), pytest.param(120.0, marks=pytest.mark.soak)],
)
async def test_outage_loses_no_record(kafka_jars: Path, tmp_path: Path, outage: float) -> None:
    with ApacheKafka(kafka_jars, tmp_path) as kafka:
        await _create(kafka.bootstrap, "kronos")

        def trouble() -> None:
            time.sleep(1)
            kafka.kill()
            time.sleep(outage)
            kafka.start()

        longest = await _deliver_during(kafka, 5, trouble, delivery_seconds=2)
        assert longest > outage / 2  # the outage had an effect


async def test_failover_of_one_broker_among_three_loses_no_record(
    kafka_jars: Path, tmp_path: Path
) -> None:
    with ApacheKafka(kafka_jars, tmp_path, nodes=3) as kafka:
        await _create(kafka.bootstrap, "kronos", partitions=6)

        def trouble() -> None:
            time.sleep(1)
            kafka.kill(0)  # a third of the partitions lose their leader
            time.sleep(5)
            kafka.start(0)

        await _deliver_during(kafka, 6, trouble)
