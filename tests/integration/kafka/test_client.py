"""The client for bots: selection of forecasts, start positions, and broker restarts."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaConnectionError

from kronos_connectors.kafka.admin import create
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import forecast_topic as topic_of
from kronos_connectors.kafka.topics import required_topics
from kronos_stream.client import Forecast, _Filter, forecasts
from kronos_stream.forecast.compose import removal
from kronos_stream.market.clock import ManualClock
from kronos_stream.market.utc import rfc3339
from kronos_stream.testing.broker import EmbeddedBroker
from tests.support.apache_kafka import ApacheKafka

BTC, ETH = "binance:BTC/USDT:1m", "binance:ETH/USDT:1m"
_MINUTE = 60_000
_START = 1_718_709_300_000


def _forecast(minute: int, *, series: str = BTC, revision: int = 0, **changes: Any) -> bytes:
    origin = _START + minute * _MINUTE
    venue, symbol, timeframe = series.split(":")
    bands = {"mean": (1.0,), "q50": (1.0,)}
    fields: dict[str, Any] = {
        "schema": "kronos.forecast/1",
        "id": f"{series}/{minute}/{revision}",
        "series": series,
        "venue": venue,
        "symbol": symbol,
        "timeframe": timeframe,
        "origin": rfc3339(origin),
        "revision": revision,
        "valid_until": rfc3339(origin + 2 * _MINUTE),
        "created_at": rfc3339(origin + _MINUTE + 300),
        "degraded": False,
        "model": {"name": "nano", "revision": "1", "tokenizer": "nano"},
        "engine": {"version": "0.1.0", "device": "cpu", "dtype": "float32"},
        "sampling": {
            "paths": 20,
            "temperature": 1,
            "top_k": 0,
            "top_p": 1,
            "seed": 0,
            "anchor": True,
        },
        "context": {
            "bars": 96,
            "first": rfc3339(_START),
            "synthetic": 0,
            "amount": "reported",
            "digest": "00",
        },
        "last": {"open": 1, "high": 1, "low": 1, "close": 1, "volume": 1},
        "times": [rfc3339(origin + _MINUTE)],
        **dict.fromkeys(("close", "open", "high", "low", "volume"), bands),
        "summary": {
            "p_up": 0.5,
            "expected_return": 0,
            "return_quantiles": {},
            "volatility": 0,
            "value_at_risk_95": 0,
        },
        "repaired": 0,
        "latency_ms": {"close_to_received": 300, "queued": 1, "compute": 10},
        "field of a later version": 1,
    }
    return Forecast.model_validate({**fields, **changes}).encode()


async def _publish(bootstrap: str, values: Sequence[bytes], prefix: str = "kronos") -> None:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, enable_idempotence=True)
    await producer.start()
    try:
        for value in values:
            key = ETH if b"ETH" in value else BTC
            await producer.send_and_wait(topic_of(prefix), value, key.encode())
    finally:
        await producer.stop()


async def _next(stream: AsyncIterator[Forecast], count: int) -> list[str]:
    async with asyncio.timeout(300):
        return [(await anext(stream)).id for _ in range(count)]


def _ids(*minutes: int, series: str = BTC, revision: int = 0) -> list[str]:
    return [f"{series}/{minute}/{revision}" for minute in minutes]


class _FakeRecord:
    """A record of aiokafka's consumer."""

    topic, partition, offset = "t", 0, 0

    def __init__(
        self, value: bytes, key: bytes | None = None, headers: Sequence[tuple[str, bytes]] = ()
    ) -> None:
        self.value, self.headers = value, headers
        self.key = key if key is not None else (ETH if b"ETH" in value else BTC).encode()


def _selected(values: Sequence[bytes | _FakeRecord], minute: int = 0, **options: Any) -> list[str]:
    """Ids of the selected forecasts, with each value read on its own."""
    selection = _Filter(ManualClock(_START + minute * _MINUTE), **options)
    return [
        forecast.id
        for value in values
        for _, forecast in selection.select(
            [value if isinstance(value, _FakeRecord) else _FakeRecord(value)]
        )
        if forecast is not None
    ]


def test_repeated_records_are_yielded_once() -> None:
    repeated = [_forecast(minute) for minute in (0, 1, 2, 0, 1, 2, 3)]
    assert _selected(repeated) == _ids(0, 1, 2, 3)
    assert _selected(repeated, duplicates=True) == _ids(0, 1, 2, 0, 1, 2, 3)


def test_models_on_one_topic_are_separate_streams() -> None:
    other = {"name": "small", "revision": "2", "tokenizer": "base"}
    assert len(_selected([_forecast(1), _forecast(1, model=other), _forecast(1)])) == 2


def test_superseded_forecast_is_skipped_if_its_revision_is_in_the_same_batch() -> None:
    selection = _Filter(ManualClock(_START))
    records = [
        _FakeRecord(_forecast(1)),
        _FakeRecord(_forecast(1, revision=1)),
        _FakeRecord(_forecast(2)),
    ]
    ids = [forecast and forecast.id for _, forecast in selection.select(records)]
    assert ids == [None, *_ids(1, revision=1), *_ids(2)]
    repeated = [*records[:2], *records[:1]]  # the beginning of a repeated delivery
    selection = _Filter(ManualClock(_START))
    assert [forecast is not None for _, forecast in selection.select(repeated)] == [
        False,
        True,
        False,
    ]
    # Read one at a time, each is the newest when it comes; an older one never follows.
    three = [_forecast(1), _forecast(1, revision=1), _forecast(1)]
    assert _selected(three) == [*_ids(1), *_ids(1, revision=1)]


def test_expired_forecasts_are_skipped() -> None:
    three = [_forecast(minute) for minute in (0, 1, 2)]
    assert _selected(three, minute=3) == _ids(2)  # 1 is valid until 3
    assert _selected(three, minute=3, expired=True) == _ids(0, 1, 2)


def test_series_and_symbols_are_selected_by_the_key() -> None:
    both = [_forecast(0), _forecast(0, series=ETH)]
    assert _selected(both, series=[ETH]) == _ids(0, series=ETH)
    assert _selected(both, symbols=["BTC/USDT"]) == _ids(0)
    assert _selected([_FakeRecord(b"not read", BTC.encode())], series=[ETH]) == []


def test_invalid_records_are_skipped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    next_major = _forecast(1).replace(b"kronos.forecast/1", b"kronos.forecast/2")
    bad = [
        _FakeRecord(b"{"),
        _FakeRecord(b"\xff", b"\xff"),
        _FakeRecord(next_major),
        _FakeRecord(b"{}", b"x"),
    ]
    with caplog.at_level(logging.WARNING):
        assert _selected([*bad, _forecast(0)]) == _ids(0)
    assert len(caplog.records) == len(bad)
    assert "t[0]@0" in caplog.text


def test_removal_is_skipped_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    message = removal(BTC, at=_START)
    with caplog.at_level(logging.WARNING):
        assert _selected(
            [_FakeRecord(message.value, BTC.encode(), message.headers), _forecast(0)]
        ) == _ids(0)
    assert not caplog.records


def test_memory_of_streams_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kronos_stream.client._MAX_STREAMS", 10)
    selection = _Filter(ManualClock(_START))
    for symbol in range(50):
        list(selection.select([_FakeRecord(_forecast(0, series=f"binance:S{symbol}/USDT:1m"))]))
    assert len(selection.newest) == 10


def test_client_imports_neither_torch_nor_pandas() -> None:
    code = "import kronos_stream.client, sys; sys.exit(bool({'torch', 'pandas'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_start_latest_and_earliest() -> None:
    with EmbeddedBroker([topic_of("kronos")]) as broker:
        await _publish(broker.bootstrap, [_forecast(0), _forecast(1)])
        async with (
            aclosing(forecasts(broker.bootstrap, start="earliest", expired=True)) as all_forecasts,
            aclosing(forecasts(broker.bootstrap, expired=True)) as new_forecasts,
        ):
            waiting = asyncio.create_task(_next(new_forecasts, 1))
            assert await _next(all_forecasts, 2) == _ids(0, 1)
            published = 2
            while not waiting.done():  # until the second stream has found its position
                await _publish(broker.bootstrap, [_forecast(published)])
                published += 1
                await asyncio.wait([waiting], timeout=0.2)
            later = _ids(*range(2, published))
            assert (await waiting)[0] in later
            assert await _next(all_forecasts, len(later)) == later
    assert len(asyncio.all_tasks()) == 1


async def test_start_at_a_time(kafka: ApacheKafka, topic_prefix: str) -> None:
    options = KafkaOptions(
        bootstrap_servers=kafka.bootstrap, topic_prefix=topic_prefix, partitions=3
    )
    await create(options, required_topics(options))
    await _publish(kafka.bootstrap, [_forecast(0)], topic_prefix)
    await asyncio.sleep(0.05)  # distinct timestamps
    moment = datetime.now(UTC)
    await asyncio.sleep(0.05)
    await _publish(kafka.bootstrap, [_forecast(1)], topic_prefix)
    stream = forecasts(kafka.bootstrap, topic_prefix=topic_prefix, start=moment, expired=True)
    async with aclosing(stream):
        assert await _next(stream, 1) == _ids(1)
    with pytest.raises(ValueError, match="group"):
        await anext(forecasts("x:1", group="bots", start=moment))


async def test_group_continues_at_its_committed_position(
    kafka: ApacheKafka, topic_prefix: str
) -> None:
    options = KafkaOptions(
        bootstrap_servers=kafka.bootstrap, topic_prefix=topic_prefix, partitions=1
    )
    await create(options, required_topics(options))
    await _publish(kafka.bootstrap, [_forecast(minute) for minute in range(4)], topic_prefix)

    def member() -> AsyncGenerator[Forecast, None]:
        return forecasts(
            kafka.bootstrap,
            topic_prefix=topic_prefix,
            group="bots",
            start="earliest",
            expired=True,
        )

    async with aclosing(member()) as first:
        assert await _next(first, 3) == _ids(0, 1, 2)
        # It stops during 2, which is therefore not committed.
    async with aclosing(member()) as second:
        assert await _next(second, 2) == _ids(2, 3)
        await _publish(kafka.bootstrap, [_forecast(4)], topic_prefix)
        assert await _next(second, 1) == _ids(4)


async def test_stream_continues_after_a_broker_restart(kafka_jars: Path, tmp_path: Path) -> None:
    with ApacheKafka(kafka_jars, tmp_path) as kafka:
        options = KafkaOptions(bootstrap_servers=kafka.bootstrap, partitions=3)
        await create(options, required_topics(options))
        async with aclosing(forecasts(kafka.bootstrap, start="earliest", expired=True)) as stream:
            await _publish(kafka.bootstrap, [_forecast(0)])
            assert await _next(stream, 1) == _ids(0)
            waiting = asyncio.create_task(_next(stream, 2))
            await asyncio.to_thread(kafka.kill)
            await asyncio.to_thread(kafka.start)
            await _publish(kafka.bootstrap, [_forecast(1), _forecast(2)])
            assert await waiting == _ids(1, 2)
    assert len(asyncio.all_tasks()) == 1


async def test_no_broker_at_the_start_is_an_error() -> None:
    with pytest.raises(KafkaConnectionError):
        await anext(forecasts("127.0.0.1:1"))
    assert len(asyncio.all_tasks()) == 1
