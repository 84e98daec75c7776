"""The MQTT sink on Mosquitto: order, limits, outages, retained forecasts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kronos_connectors.mqtt import SINK, MqttOptions
from kronos_connectors.mqtt.sink import MqttSink
from kronos_stream.interfaces.diagnostics import CheckedSink, Finding
from kronos_stream.interfaces.sink import Record, RecordKind, Refusal, SinkUnavailable
from kronos_stream.market.clock import SystemClock
from tests.support.mosquitto import Mosquitto, Subscriber, publish, retained_messages

BrokerOf = Callable[..., Mosquitto]

_SERIES = [f"binance:S{i}/USDT:1s" for i in range(20)]
_SIZE = 6_000


def _options(broker: Mosquitto, **options: Any) -> MqttOptions:
    return MqttOptions(**{"url": broker.url, "client_id": "test", **options})


def _record(sequence: int, *, size: int = _SIZE, kind: RecordKind = "forecast") -> Record:
    value = (b"%d " % sequence).ljust(size, b".")
    key = _SERIES[sequence % len(_SERIES)]
    headers = (("ce_id", b"%d" % sequence), ("content-type", b"application/json"))
    return Record(sequence, kind, key, value, headers, time.time_ns() // 1_000_000)


def _topic(sequence: int) -> str:
    return f"kronos/forecasts/binance/S{sequence % len(_SERIES)}%2FUSDT/1s"


@asynccontextmanager
async def _sink(broker: Mosquitto, **options: Any) -> AsyncIterator[MqttSink]:
    sink = SINK.build(_options(broker, **options), SystemClock(), Random(0))
    assert isinstance(sink, MqttSink)
    try:
        yield sink
    finally:
        await sink.close()


async def _deliver_with_retries(sink: MqttSink, records: Sequence[Record]) -> list[Refusal]:
    """Deliver until the sink has accepted the records, as the outbox does."""
    async with asyncio.timeout(300):
        while True:
            try:
                await sink.start()
                return list(await sink.deliver(records))
            except SinkUnavailable:
                await asyncio.sleep(0.1)


async def _wait_until(condition: Callable[[], object], seconds: float = 300.0) -> None:
    """Return once ``condition`` holds; it may block."""
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 - no event is set for it
            await asyncio.sleep(0.05)


def _first_in_order(subscriber: Subscriber, expected: Sequence[int]) -> None:
    """Check that no record is missing, and that first occurrences are in order per topic."""
    first: dict[str, list[int]] = {}
    seen: set[int] = set()
    for message in subscriber.messages():
        if message.topic.startswith("kronos/forecasts/"):
            sequence = int(message.payload.split()[0])
            assert message.topic == _topic(sequence)
            if sequence not in seen:
                seen.add(sequence)
                first.setdefault(message.topic, []).append(sequence)
    assert seen == set(expected)
    assert all(sequences == sorted(sequences) for sequences in first.values())


async def test_records_arrive_unchanged_and_in_order(
    make_mosquitto: BrokerOf, tmp_path: Path
) -> None:
    with make_mosquitto() as broker, Subscriber(broker, tmp_path) as subscriber:
        records = [_record(i) for i in range(200)]
        async with _sink(broker) as sink:
            await sink.start()
            for first in range(0, 200, 50):
                assert not await sink.deliver(records[first : first + 50])
            assert not await sink.deliver([])
            assert not await sink.deliver([_record(200, kind="deadletter")])
            await _wait_until(lambda: len(subscriber.messages()) == 202)
            kept = await asyncio.to_thread(retained_messages, broker)
        assert kept["kronos/status/test"] == b"online"
        assert {topic: int(value.split()[0]) for topic, value in kept.items() if "/f" in topic} == {
            _topic(i): i for i in range(180, 200)
        }
        assert len(kept) == 21  # no dead letter among them
        _first_in_order(subscriber, range(200))
        for message in subscriber.messages()[1:201]:
            sent = records[int(message.payload.split()[0])]
            assert (message.payload, message.qos) == (sent.value, 1)
            assert message.properties["content-type"] == "application/json"
            assert message.properties["user-properties"] == {"id": str(sent.sequence)}
        assert subscriber.messages()[201].topic == "kronos/deadletter"
        await _wait_until(lambda: subscriber.messages()[-1].payload == b"offline")
        assert (await asyncio.to_thread(retained_messages, broker))[
            "kronos/status/test"
        ] == b"offline"
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize("window", [1, 5])
async def test_inflight_limit_of_the_broker_is_respected(
    make_mosquitto: BrokerOf, tmp_path: Path, window: int
) -> None:
    settings = [f"max_inflight_messages {window}"]
    with make_mosquitto(settings=settings) as broker, Subscriber(broker, tmp_path) as subscriber:
        async with _sink(broker) as sink:
            await sink.start()
            assert not await sink.deliver([_record(i) for i in range(300)])
            await _wait_until(lambda: len(subscriber.messages()) >= 301)
        _first_in_order(subscriber, range(300))
        assert len(subscriber.messages()) == 302  # no repetition; and online, offline


@pytest.mark.parametrize("setting", ["message_size_limit 9000", "max_packet_size 9000"])
async def test_refused_records_do_not_block_others(
    make_mosquitto: BrokerOf, tmp_path: Path, setting: str
) -> None:
    """The broker announces one of these limits, and disconnects at the other."""
    with make_mosquitto(settings=[setting]) as broker, Subscriber(broker, tmp_path) as subscriber:
        big = {7, 30, 31}
        records = [_record(i, size=12_000 if i in big else 3_000) for i in range(60)]
        async with _sink(broker, max_record_bytes=40_000) as sink:
            refusals = await _deliver_with_retries(sink, [*records, _record(99, size=50_000)])
            assert [refusal.record.sequence for refusal in refusals] == [*sorted(big), 99]
            assert all(refusal.reason for refusal in refusals)
            assert not await _deliver_with_retries(
                sink, [_record(i, size=3_000) for i in range(60, 80)]
            )
            await _wait_until(lambda: len({m.payload for m in subscriber.messages()}) >= 78)
        _first_in_order(subscriber, sorted(set(range(80)) - big))


async def test_missing_permission_keeps_records_waiting(
    make_mosquitto: BrokerOf, tmp_path: Path
) -> None:
    rules = tmp_path / "acl"
    rules.write_text("topic read #\ntopic write kronos/status/#\n", "utf-8")
    with make_mosquitto(settings=[f"acl_file {rules}"]) as broker:
        async with _sink(broker) as sink:
            await sink.start()
            with pytest.raises(SinkUnavailable, match=r"forecasts/binance/S3%2FUSDT/1s: not auth"):
                await sink.deliver([_record(3), _record(4)])
            # The connection stays open.
            assert (await asyncio.to_thread(retained_messages, broker))[
                "kronos/status/test"
            ] == b"online"


async def test_unreachable_broker_is_reported_with_its_address(make_mosquitto: BrokerOf) -> None:
    broker = make_mosquitto()
    began = time.monotonic()
    async with _sink(broker) as sink:
        with pytest.raises(SinkUnavailable, match=rf"127\.0\.0\.1:{broker.port}.*refused"):
            await sink.start()
        with pytest.raises(SinkUnavailable):
            await sink.deliver([_record(0)])
        assert time.monotonic() - began < 60
        with broker:
            assert not await _deliver_with_retries(sink, [_record(0)])
    assert len(asyncio.all_tasks()) == 1


async def test_refused_login_is_reported(make_mosquitto: BrokerOf) -> None:
    with make_mosquitto(users={"me": "right"}) as broker:
        async with _sink(broker, username="me", password="wrong-secret") as sink:  # noqa: S106
            with pytest.raises(SinkUnavailable, match="KRONOS_STREAM_MQTT__PASSWORD") as refused:
                await sink.start()
            assert "wrong-secret" not in str(refused.value)
        async with _sink(broker, username="me", password="right") as sink:  # noqa: S106
            await sink.start()
            assert not await sink.deliver([_record(0)])


async def test_delivery_and_close_are_bounded_if_the_broker_hangs(
    make_mosquitto: BrokerOf, tmp_path: Path
) -> None:
    with make_mosquitto() as broker, Subscriber(broker, tmp_path) as subscriber:
        async with _sink(broker, delivery_seconds=1, connect_seconds=1) as sink:
            await sink.start()
            broker.freeze()
            began = time.monotonic()
            with pytest.raises(SinkUnavailable, match="no acknowledgement in 1 s"):
                await sink.deliver([_record(i) for i in range(10)])
            assert time.monotonic() - began < 60
            await _wait_until(lambda: "no answer in 1 s" in sink._reconnector.problem)
            broker.thaw()
            assert not await _deliver_with_retries(sink, [_record(i) for i in range(10)])
            broker.freeze()
            delivery = asyncio.create_task(sink.deliver([_record(10)]))
            await asyncio.sleep(0.1)
            delivery.cancel()
            with suppress(asyncio.CancelledError):
                await delivery
            began = time.monotonic()
            await sink.close()
            assert time.monotonic() - began < 60
            broker.thaw()
        async with _sink(broker) as sink:
            assert not await _deliver_with_retries(sink, [_record(i) for i in range(12)])
            await _wait_until(lambda: subscriber.messages()[-1].payload.startswith(b"11 "))
        _first_in_order(subscriber, range(12))
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize(
    "outage", [2.0, *(pytest.param(s, marks=pytest.mark.soak) for s in (30.0, 120.0))]
)
async def test_latest_forecasts_are_retained_again_after_the_broker_lost_them(
    make_mosquitto: BrokerOf, outage: float
) -> None:
    """The broker has no disk, and no later record replaces the first ten series."""
    with make_mosquitto(persistent=False) as broker:
        async with _sink(broker) as sink:
            assert not await _deliver_with_retries(sink, [_record(i) for i in range(40)])
            await asyncio.to_thread(broker.kill)
            with pytest.raises(SinkUnavailable):
                await sink.deliver([_record(40)])
            await asyncio.sleep(outage)
            await asyncio.to_thread(broker.start)
            assert not await _deliver_with_retries(sink, [_record(i) for i in range(40, 50)])
            kept = await asyncio.to_thread(retained_messages, broker)
        assert {topic: int(value.split()[0]) for topic, value in kept.items() if "/f" in topic} == {
            _topic(i): i for i in range(30, 50)
        }
        assert kept["kronos/status/test"] == b"online"


async def test_last_will_reports_a_lost_sink(make_mosquitto: BrokerOf) -> None:
    with make_mosquitto() as broker:
        async with _sink(broker) as sink:
            await sink.start()
            assert sink._reconnect_task is not None
            assert sink._connection is not None
            assert sink._connection._client._sock is not None
            sink._connection._client._sock.close()  # as the kernel does after a kill
            sink._reconnect_task.cancel()
            await asyncio.wait([sink._reconnect_task])
            kept = await asyncio.to_thread(retained_messages, broker)
        assert kept["kronos/status/test"] == b"offline"


async def test_removed_series_is_not_retained(make_mosquitto: BrokerOf, tmp_path: Path) -> None:
    with make_mosquitto(persistent=False) as broker:
        async with _sink(broker) as sink:
            with Subscriber(broker, tmp_path) as subscriber:
                removal = _record(22, kind="removal")
                assert not await _deliver_with_retries(sink, [_record(1), _record(2), removal])
                await _wait_until(lambda: len(subscriber.messages()) == 5)
                payloads = [m.payload for m in subscriber.messages() if m.topic == _topic(2)]
                assert payloads == [_record(2).value, removal.value, b""]
            kept = await asyncio.to_thread(retained_messages, broker)
            assert _topic(1) in kept
            assert _topic(2) not in kept
            # It is deleted again if the broker has restored it.
            await asyncio.to_thread(publish, broker, _topic(2), b"old", retain=True)
            sink._connection.abort("test")  # type: ignore[union-attr]
            assert not await _deliver_with_retries(sink, [_record(3)])
            assert _topic(2) not in await asyncio.to_thread(retained_messages, broker)


async def test_doctor_checks_the_broker(make_mosquitto: BrokerOf) -> None:
    async def found(broker: Mosquitto, **options: Any) -> Finding:
        sink = SINK.build(_options(broker, **options), SystemClock(), Random(0))
        assert isinstance(sink, CheckedSink)
        (check,) = sink.checks()
        (finding,) = await check.run()
        return finding

    with make_mosquitto(users={"me": "right"}, settings=["max_packet_size 50000"]) as broker:
        fine = await found(broker, username="me", password="right")  # noqa: S106
        assert fine.level == "ok"
        assert "50,000 bytes a message, 20 messages at once" in fine.found
        refused = await found(broker, username="me", password="wrong-secret")  # noqa: S106
        assert refused.level == "fail"
        assert "KRONOS_STREAM_MQTT__PASSWORD" in refused.found
        await asyncio.to_thread(broker.stop)
        away = await found(broker)
        assert away.level == "fail"
        assert "KRONOS_STREAM_MQTT__URL" in away.remedy
    with make_mosquitto(settings=["retain_available false"]) as forgetful:
        assert "retains no messages" in (await found(forgetful)).found
        async with _sink(forgetful) as sink:
            with pytest.raises(SinkUnavailable, match=r"retain not supported; enable"):
                await sink.start()
