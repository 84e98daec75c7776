"""Throughput of a growing group, and time until a member has its contexts, on real Kafka.

What is measured is printed, for docs/performance.md; only what must never be is asserted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest
from confluent_kafka import Producer

from kronos_connectors.kafka.admin import create
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import candle_topic, forecast_topic, required_topics
from kronos_stream.forecast.message import Forecast
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.candle_message import encode_bar
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from tests.support.apache_kafka import ApacheKafka
from tests.support.daemon_process import DaemonProcess
from tests.support.fake_worker import daemon_command
from tests.support.forecast_audit import read_topic
from tests.support.processes import wait_for

LOOKBACK = 128
PACE = 0.01
"""Seconds per forecast of the fake worker."""


def _series(count: int, timeframe: str) -> list[Series]:
    length = Timeframe.parse(timeframe)
    return [Series.of("binance", f"S{number}/USDT", length) for number in range(count)]


class HistoryWriter:
    """Writes bars like role ingest, each with the time of its close."""

    def __init__(self, bootstrap: str, prefix: str) -> None:
        self._producer = Producer(
            {"bootstrap.servers": bootstrap, "enable.idempotence": True, "linger.ms": 20}
        )
        self._prefix, self._random = prefix, Random(0)

    def write(self, series: Sequence[Series], opens: Sequence[int], *, history: int = 0) -> None:
        """history: number of first bars that trigger no forecast."""
        topic = candle_topic(self._prefix, series[0].timeframe)
        for number, opened in enumerate(opens):
            for one in series:
                close = 100 + self._random.random()
                candle = Candle(opened, 100.5, 102.0, 99.0, close, 5.0, 500.0)
                closed = one.timeframe.after(opened)
                value = encode_bar(one, Bar(candle, received=closed), history=number < history)
                while True:
                    try:
                        self._producer.produce(topic, value, one.name, timestamp=closed)
                        break
                    except BufferError:
                        self._producer.poll(0.1)
        assert self._producer.flush(60) == 0


def _opens(timeframe: str, bars: int) -> list[int]:
    """Open times of the newest closed bars."""
    length = Timeframe.parse(timeframe)
    now = time.time_ns() // 1_000_000 // length.after(0) * length.after(0)
    return [length.after(now, back - bars) for back in range(bars)]


def _topics(kafka: ApacheKafka, prefix: str, *timeframes: str) -> None:
    options = KafkaOptions(bootstrap_servers=kafka.bootstrap, topic_prefix=prefix)
    asyncio.run(
        create(options, required_topics(options, [Timeframe.parse(one) for one in timeframes]))
    )


def _member(
    kafka: ApacheKafka, prefix: str, folder: Path, pace: float, **settings: str
) -> DaemonProcess:
    folder.mkdir()
    given = {
        "ROLE": "forecast",
        "SINKS": "kafka",
        "KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap,
        "KAFKA__TOPIC_PREFIX": prefix,
        "LOOKBACK": str(LOOKBACK),
    }
    command = daemon_command(pace)
    return DaemonProcess(folder, {**given, **settings}, command)


@pytest.mark.soak
def test_throughput_grows_with_the_group(
    kafka: ApacheKafka, topic_prefix: str, tmp_path: Path
) -> None:
    series, seconds = _series(240, "1s"), 20
    _topics(kafka, topic_prefix, "1s")
    bars = LOOKBACK + 300
    HistoryWriter(kafka.bootstrap, topic_prefix).write(series, _opens("1s", bars), history=LOOKBACK)
    rates: dict[int, float] = {}
    for size in (1, 2, 4):
        with ExitStack() as stack:
            members = []
            for number in range(size):
                folder = tmp_path / f"{size}-{number}"
                group = {"KAFKA__GROUP": f"{topic_prefix}-{size}"}
                member_settings = {**group, "TIMEFRAMES": "1s", "CATCH_UP": "all"}
                member = _member(kafka, topic_prefix, folder, PACE, **member_settings)
                members.append(stack.enter_context(member))
                member.start()
            for member in members:
                member.wait_until_ready()
            time.sleep(8)  # until all have joined and have partitions

            def delivered(members: Sequence[DaemonProcess] = tuple(members)) -> float:
                return sum(member.metric("kronos_delivered_total") for member in members)

            began, before = time.monotonic(), delivered()
            time.sleep(seconds)
            rates[size] = (delivered() - before) / (time.monotonic() - began)
            lags = [member.metric("kronos_queue_depth", queue="due") for member in members]
            assert all(lags), "a member had no work left"
    for size, rate in rates.items():
        print(f"\n{size} members: {rate:.0f} forecasts/s, {rate / rates[1]:.2f} times one", end="")  # noqa: T201
    assert rates[2] > 1.5 * rates[1]
    assert rates[4] > 2.5 * rates[1]


def _rebuilt(kafka: ApacheKafka, prefix: str, folder: Path, count: int) -> list[float]:
    """Seconds until the member of a new group, and its successor, are ready."""
    _topics(kafka, prefix, "1s", "1d")
    past = HistoryWriter(kafka.bootstrap, prefix)
    daily, quick = _series(count, "1d"), _series(count, "1s")
    days, seconds = _opens("1d", 2 * LOOKBACK), _opens("1s", 10 * LOOKBACK)
    past.write(daily, days[:-1])
    past.write(quick, seconds[:-1])
    took = []
    for catch_up in ("newest", "all"):
        member_settings = {"TIMEFRAMES": "1s,1d", "CATCH_UP": catch_up}
        with _member(kafka, prefix, folder / catch_up, 0.001, **member_settings) as member:
            began = time.monotonic()
            member.start()
            member.wait_until_ready()
            took.append(time.monotonic() - began)
            if catch_up == "all":
                past.write(daily, days[-1:])
                past.write(quick, seconds[-1:])

                def done(member: DaemonProcess = member) -> bool:
                    return member.metric("kronos_outcomes_total", result="forecast") == 2 * count

                wait_for("every series is forecast", done)
            assert member.stop() == 0
    published = [
        Forecast.parse(value) for _, value in read_topic(kafka.bootstrap, forecast_topic(prefix))
    ]
    bars = {one.series: one.context.bars for one in published}
    assert bars == {one.name: LOOKBACK for one in (*quick, *daily)}
    return took


def test_contexts_of_seconds_and_days_are_rebuilt(
    kafka: ApacheKafka, topic_prefix: str, tmp_path: Path
) -> None:
    new, later = _rebuilt(kafka, topic_prefix, tmp_path, 6)
    print(f"\nready after {new:.1f} s in a new group, {later:.1f} s in one that goes on")  # noqa: T201


@pytest.mark.soak
def test_contexts_of_many_series_are_rebuilt(
    kafka: ApacheKafka, topic_prefix: str, tmp_path: Path
) -> None:
    new, later = _rebuilt(kafka, topic_prefix, tmp_path, 300)
    print(f"\nready after {new:.1f} s in a new group, {later:.1f} s in one that goes on")  # noqa: T201
    assert max(new, later) < 60
