"""The embedded broker with three client libraries."""

from __future__ import annotations

import asyncio
import shutil
import socket

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from click.testing import CliRunner
from confluent_kafka import Consumer

from kronos_stream.commands.topics import topics
from kronos_stream.testing.broker import PARTITIONS, EmbeddedBroker

RECORDS = 200


async def _fill(bootstrap: str) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, enable_idempotence=True)
    await producer.start()
    sent = [
        await producer.send("t", b"%d" % i, b"key %d" % (i % 10), headers=[("n", b"%d" % i)])
        for i in range(RECORDS)
    ]
    await asyncio.gather(*sent)
    await producer.stop()


async def test_aiokafka_reads_all_records_in_order_with_and_without_a_group() -> None:
    with EmbeddedBroker(brokers=2) as broker:
        assert len(broker.bootstrap.split(",")) == 2
        await _fill(broker.bootstrap)
        for group in (None, "group"):
            consumer = AIOKafkaConsumer(
                "t",
                bootstrap_servers=broker.bootstrap,
                group_id=group,
                auto_offset_reset="earliest",
            )
            await consumer.start()
            seen: dict[bytes, list[int]] = {}
            async with asyncio.timeout(300):
                while sum(map(len, seen.values())) < RECORDS:
                    record = await consumer.getone()
                    seen.setdefault(record.key, []).append(int(record.value))
                    assert record.headers == (("n", record.value),)
            assert len(consumer.partitions_for_topic("t")) == PARTITIONS
            await consumer.stop()
            assert len(seen) == 10
            assert all(numbers == sorted(numbers) for numbers in seen.values())


async def test_confluent_kafka_and_kcat_read_all_records() -> None:
    with EmbeddedBroker() as broker:
        await _fill(broker.bootstrap)

        consumer = Consumer(
            {
                "bootstrap.servers": broker.bootstrap,
                "group.id": "group",
                "auto.offset.reset": "earliest",
            }
        )
        consumer.subscribe(["t"])
        seen = 0
        async with asyncio.timeout(300):
            while seen < RECORDS:
                seen += len(await asyncio.to_thread(consumer.consume, RECORDS, 0.5))
        consumer.close()

        if shutil.which("kcat") is None:
            pytest.skip("no kcat on PATH: tested with aiokafka and confluent-kafka only")
        command = ("kcat", "-C", "-b", broker.bootstrap, "-t", "t", "-e", "-q", "-o", "beginning")
        kcat = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        printed, _ = await asyncio.wait_for(kcat.communicate(), 300)
        assert sorted(map(int, printed.split())) == list(range(RECORDS))


@pytest.mark.parametrize("command", ["create", "check"])
def test_topics_command_reports_an_unsupported_broker(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedBroker(["kronos.forecasts.v1"]) as broker:
        monkeypatch.setenv("KRONOS_STREAM_KAFKA__BOOTSTRAP_SERVERS", broker.bootstrap)
        ended = CliRunner().invoke(topics, [command])
    assert ended.exit_code == 1
    assert "does not support creating and describing topics" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_close_ends_the_broker() -> None:
    with EmbeddedBroker() as broker:
        host, port = broker.bootstrap.split(":")
        socket.create_connection((host, int(port)), timeout=60).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=60)
