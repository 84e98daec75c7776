"""The client for bots: what it passes on, where it begins, and that it survives its brokers."""

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
    given: dict[str, Any] = {
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
        "what a later version may add": 1,
    }
    return Forecast.model_validate({**given, **changes}).encode()


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


def _names(*minutes: int, series: str = BTC, revision: int = 0) -> list[str]:
    return [f"{series}/{minute}/{revision}" for minute in minutes]


class _FakeRecord:
    """A record as the consumer gives it."""

    topic, partition, offset = "t", 0, 0

    def __init__(
        self, value: bytes, key: bytes | None = None, headers: Sequence[tuple[str, bytes]] = ()
    ) -> None:
        self.value, self.headers = value, headers
        self.key = key if key is not None else (ETH if b"ETH" in value else BTC).encode()


def _passed(values: Sequence[bytes | _FakeRecord], minute: int = 0, **choice: Any) -> list[str]:
    settings: dict[str, Any] = {
        **dict.fromkeys(("series", "symbols")),
        **dict.fromkeys(("duplicates", "superseded", "expired"), False),
        **choice,
    }
    chosen = _Filter(clock=ManualClock(_START + minute * _MINUTE), **settings)
    return [
        forecast.id
        for value in values
        for _, forecast in chosen.select(
            [value if isinstance(value, _FakeRecord) else _FakeRecord(value)]
        )
        if forecast is not None
    ]


def test_repeated_records_are_passed_on_once() -> None:
    again = [_forecast(minute) for minute in (0, 1, 2, 0, 1, 2, 3)]
    assert _passed(again) == _names(0, 1, 2, 3)
    assert _passed(again, duplicates=True) == _names(0, 1, 2, 0, 1, 2, 3)


def test_two_models_on_one_topic_are_two_streams() -> None:
    other = {"name": "small", "revision": "2", "tokenizer": "base"}
    assert len(_passed([_forecast(1), _forecast(1, model=other), _forecast(1)])) == 2


def test_a_superseded_forecast_is_not_passed_on_if_its_successor_is_there() -> None:
    chosen = _Filter(None, None, ManualClock(_START), False, False, False)  # noqa: FBT003
    records = [
        _FakeRecord(_forecast(1)),
        _FakeRecord(_forecast(1, revision=1)),
        _FakeRecord(_forecast(2)),
    ]
    passed = [forecast and forecast.id for _, forecast in chosen.select(records)]
    assert passed == [None, *_names(1, revision=1), *_names(2)]
    again = [*records[:2], *records[:1]]  # a delivery that was repeated, and read half
    chosen = _Filter(None, None, ManualClock(_START), False, False, False)  # noqa: FBT003
    assert [forecast is not None for _, forecast in chosen.select(again)] == [False, True, False]
    # One at a time, each is the newest when it comes; an older one is never passed on later.
    three = [_forecast(1), _forecast(1, revision=1), _forecast(1)]
    assert _passed(three) == [*_names(1), *_names(1, revision=1)]


def test_an_expired_forecast_is_not_passed_on() -> None:
    three = [_forecast(minute) for minute in (0, 1, 2)]
    assert _passed(three, minute=3) == _names(2)  # 1 is valid until 3
    assert _passed(three, minute=3, expired=True) == _names(0, 1, 2)


def test_series_and_symbols_are_chosen_by_the_key() -> None:
    both = [_forecast(0), _forecast(0, series=ETH)]
    assert _passed(both, series=[ETH]) == _names(0, series=ETH)
    assert _passed(both, symbols=["BTC/USDT"]) == _names(0)
    assert _passed([_FakeRecord(b"not read", BTC.encode())], series=[ETH]) == []


def test_bad_records_are_skipped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    next_major = _forecast(1).replace(b"kronos.forecast/1", b"kronos.forecast/2")
    bad = [
        _FakeRecord(b"{"),
        _FakeRecord(b"\xff", b"\xff"),
        _FakeRecord(next_major),
        _FakeRecord(b"{}", b"x"),
    ]
    with caplog.at_level(logging.WARNING):
        assert _passed([*bad, _forecast(0)]) == _names(0)
    assert len(caplog.records) == len(bad)
    assert "t[0]@0" in caplog.text


def test_a_removal_is_no_forecast_and_nothing_to_warn_of(caplog: pytest.LogCaptureFixture) -> None:
    gone = removal(BTC, at=_START)
    with caplog.at_level(logging.WARNING):
        assert _passed(
            [_FakeRecord(gone.value, BTC.encode(), gone.headers), _forecast(0)]
        ) == _names(0)
    assert not caplog.records


def test_what_it_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kronos_stream.client._MAX_STREAMS", 10)
    chosen = _Filter(None, None, ManualClock(_START), False, False, False)  # noqa: FBT003
    for symbol in range(50):
        list(chosen.select([_FakeRecord(_forecast(0, series=f"binance:S{symbol}/USDT:1m"))]))
    assert len(chosen._newest) == 10


def test_it_imports_neither_torch_nor_pandas() -> None:
    code = "import kronos_stream.client, sys; sys.exit(bool({'torch', 'pandas'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_it_begins_where_it_is_told() -> None:
    with EmbeddedBroker([topic_of("kronos")]) as broker:
        await _publish(broker.bootstrap, [_forecast(0), _forecast(1)])
        # Opens before its first forecast comes.
        async with (
            aclosing(forecasts(broker.bootstrap, start="earliest", expired=True)) as all_of_them,
            aclosing(forecasts(broker.bootstrap, expired=True)) as new_ones,
        ):
            waiting = asyncio.create_task(_next(new_ones, 1))
            assert await _next(all_of_them, 2) == _names(0, 1)
            await asyncio.sleep(0.5)
            await _publish(broker.bootstrap, [_forecast(2)])
            assert await waiting == _names(2)
            assert await _next(all_of_them, 1) == _names(2)
    assert len(asyncio.all_tasks()) == 1


async def test_it_can_begin_at_a_time(kafka: ApacheKafka, topic_prefix: str) -> None:
    options = KafkaOptions(
        bootstrap_servers=kafka.bootstrap, topic_prefix=topic_prefix, partitions=3
    )
    await create(options, required_topics(options))
    await _publish(kafka.bootstrap, [_forecast(0)], topic_prefix)
    await asyncio.sleep(0.05)
    moment = datetime.now(UTC)
    await asyncio.sleep(0.05)
    await _publish(kafka.bootstrap, [_forecast(1)], topic_prefix)
    stream = forecasts(kafka.bootstrap, topic_prefix=topic_prefix, start=moment, expired=True)
    async with aclosing(stream):
        assert await _next(stream, 1) == _names(1)
    with pytest.raises(ValueError, match="group"):
        await anext(forecasts("x:1", group="bots", start=moment))


async def test_a_group_goes_on_after_what_it_has_finished(
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
        assert await _next(first, 3) == _names(0, 1, 2)
        # It stops in the midst of 2, of which nobody knows whether it was done.
    async with aclosing(member()) as second:
        assert await _next(second, 2) == _names(2, 3)
        await _publish(kafka.bootstrap, [_forecast(4)], topic_prefix)
        assert await _next(second, 1) == _names(4)


async def test_it_survives_its_broker(kafka_jars: Path, tmp_path: Path) -> None:
    with ApacheKafka(kafka_jars, tmp_path) as kafka:
        options = KafkaOptions(bootstrap_servers=kafka.bootstrap, partitions=3)
        await create(options, required_topics(options))
        async with aclosing(forecasts(kafka.bootstrap, start="earliest", expired=True)) as stream:
            await _publish(kafka.bootstrap, [_forecast(0)])
            assert await _next(stream, 1) == _names(0)
            waiting = asyncio.create_task(_next(stream, 2))
            await asyncio.to_thread(kafka.kill)
            await asyncio.to_thread(kafka.start)
            await _publish(kafka.bootstrap, [_forecast(1), _forecast(2)])
            assert await waiting == _names(1, 2)
    assert len(asyncio.all_tasks()) == 1


async def test_no_broker_at_first_is_an_error() -> None:
    with pytest.raises(KafkaConnectionError):
        await anext(forecasts("127.0.0.1:1"))
    assert len(asyncio.all_tasks()) == 1
