"""Outages of Kafka and of one broker of three: no loss, no growth, no change of order.

The daemon and the brokers are processes; an hour without a broker is one of the event loop's time.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from random import Random

import pytest
from confluent_kafka import Producer

from kronos_connectors.kafka import SINK
from kronos_connectors.kafka.admin import create
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import deadletter_topic, forecast_topic, required_topics
from kronos_stream.daemon.delivery.outbox import Outbox
from kronos_stream.daemon.storage.state import State
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.forecast.message import DeadLetter
from kronos_stream.interfaces.sink import Envelope, Record, Refusal, SinkUnavailable
from kronos_stream.market.clock import Clock, LoopClock, SystemClock
from tests.support.apache_kafka import ApacheKafka
from tests.support.daemon_process import DaemonProcess
from tests.support.exchange_process import ExchangeProcess
from tests.support.forecast_audit import audit_forecasts, read_topic
from tests.support.processes import WAIT_SECONDS, resident_mib, wait_for

SYMBOLS = 8
SOAK_SECONDS = float(os.environ.get("KRONOS_SOAK_OUTAGE_SECONDS", "120"))
GROWTH_MIB = 64.0
"""Allowed in memory: what waits there (16), the state file's cache (16), allocators' breath."""

FORECAST_BYTES = 6_000
START = 1_800_000_000_000


@pytest.mark.parametrize(
    "seconds",
    [10.0, pytest.param(SOAK_SECONDS, marks=[pytest.mark.soak, pytest.mark.timeout(900)])],
)
def test_forecasts_wait_for_kafka_to_return(
    seconds: float,
    kafka_jars: Path,
    topic_prefix: str,
    tmp_path: Path,
    make_daemon: Callable[..., DaemonProcess],
) -> None:
    exchange = ExchangeProcess("--symbols", str(SYMBOLS), "--history", "600")
    with exchange, ApacheKafka(kafka_jars, tmp_path / "kafka") as kafka, ExitStack() as stack:
        daemon = stack.enter_context(make_daemon(exchange, kafka.bootstrap, CATCH_UP="all"))
        daemon.start()
        daemon.wait_until_ready()
        _wait_for_more(daemon)
        before = daemon.resident_mib()
        kafka.kill()
        wait_for("the daemon notices the outage", lambda: daemon.readiness()[0] == 503)
        status, checks = daemon.readiness()
        assert checks.pop("sink kafka") not in {"", "ok"}
        assert (status, set(checks.values())) == (503, {"ok"})
        made = daemon.metric("kronos_outcomes_total", result="forecast")
        time.sleep(seconds)
        during = daemon.resident_mib()
        forecast = partial(daemon.metric, "kronos_outcomes_total", result="forecast")
        wait_for("more forecasts", lambda: forecast() > made)
        age = partial(daemon.metric, "kronos_outbox_age_seconds")
        wait_for("forecasts wait for Kafka", lambda: age() >= seconds / 2)
        kafka.start()
        wait_for("it delivers again", lambda: daemon.readiness()[0] == 200)
        _wait_for_more(daemon)
        print(  # noqa: T201
            f"{seconds:g} s without Kafka: {before:.0f} MiB before, {during:.0f} at the end, "
            f"{daemon.resident_mib():.0f} after"
        )
        assert daemon.stop() == 0
        _assert_nothing_is_lost(daemon, exchange, kafka.bootstrap, topic_prefix)
    assert during - before < GROWTH_MIB


def test_loss_of_one_broker_of_three_is_tolerated(
    kafka_jars: Path,
    topic_prefix: str,
    tmp_path: Path,
    make_daemon: Callable[..., DaemonProcess],
) -> None:
    exchange = ExchangeProcess("--symbols", str(SYMBOLS), "--history", "600")
    brokers = ApacheKafka(kafka_jars, tmp_path / "kafka", nodes=3)
    with exchange, brokers as kafka, ExitStack() as stack:
        daemon = stack.enter_context(make_daemon(exchange, kafka.bootstrap, CATCH_UP="all"))
        daemon.start()
        daemon.wait_until_ready()
        _wait_for_more(daemon)
        leader = kafka.node_at_port(_leader_port(kafka.bootstrap, forecast_topic(topic_prefix)))
        kafka.kill(leader)
        died = time.monotonic()
        _wait_for_more(daemon)
        print(f"forecasts again {time.monotonic() - died:.1f} s after a leader died")  # noqa: T201
        kafka.start(leader)
        _wait_for_more(daemon)
        assert daemon.stop() == 0
        _assert_nothing_is_lost(daemon, exchange, kafka.bootstrap, topic_prefix)


async def test_refused_records_become_dead_letters_without_delay(
    kafka: ApacheKafka, topic_prefix: str, tmp_path: Path
) -> None:
    bootstrap = kafka.bootstrap
    options = KafkaOptions(
        bootstrap_servers=bootstrap,
        topic_prefix=topic_prefix,
        partitions=4,
        max_record_bytes=80_000,
    )
    await create(options, required_topics(options))
    sink = SINK.build(options, SystemClock(), Random(0))
    clock = _ShiftedClock()
    state = await State.open(tmp_path / "state")
    outbox = _outbox(state, sink, clock)
    for i in range(40):
        # Sooner or later of one series: the others of it and of its partition go on.
        size = 90_000 if i == 11 else FORECAST_BYTES
        clock.ahead_ms = 7_200_000 if i == 22 else 0  # brokers take an hour
        await outbox.publish([], [_message(i, size)])
    clock.ahead_ms = 0
    running = asyncio.create_task(outbox.run())
    left = await outbox.drain(30.0)
    running.cancel()
    await asyncio.wait([running])
    await state.close()
    assert left == 0

    arrived = await asyncio.to_thread(read_topic, bootstrap, forecast_topic(topic_prefix))
    by_key: dict[str, list[int]] = {}
    for key, value in arrived:
        by_key.setdefault(key, []).append(int(value.split()[0]))
    assert by_key == {
        f"binance:S{s}/USDT:1s": [i for i in range(s, 40, 4) if i not in {11, 22}] for s in range(4)
    }
    dead_letters = await asyncio.to_thread(read_topic, bootstrap, deadletter_topic(topic_prefix))
    letters = {key: DeadLetter.parse(value) for key, value in dead_letters}
    assert {key: letter.what for key, letter in letters.items()} == {
        "binance:S3/USDT:1s": "record",
        "binance:S2/USDT:1s": "record",
    }
    assert letters["binance:S3/USDT:1s"].content().startswith(b"11 ")
    assert letters["binance:S2/USDT:1s"].content().startswith(b"22 ")


@pytest.mark.virtual_time
@pytest.mark.parametrize("hours", [0.05, pytest.param(1.0, marks=pytest.mark.soak)])
async def test_hours_without_a_sink_need_no_memory(hours: float, tmp_path: Path) -> None:
    """20 forecasts per second, in virtual time."""
    seconds = round(3_600 * hours)
    before = resident_mib()

    clock = LoopClock(START)
    state, sink = await State.open(tmp_path / "state"), _UnavailableSink()
    outbox = _outbox(state, sink, clock)
    running = asyncio.create_task(outbox.run())
    for second in range(seconds):
        await outbox.publish([], [_message(20 * second + i, FORECAST_BYTES) for i in range(20)])
        await clock.sleep(1.0)
    assert outbox.problems() == {"gone": "no broker"}
    grown = resident_mib() - before
    sink.available = True
    assert await outbox.drain(3_600.0) == 0
    assert outbox.problems() == {"gone": ""}
    running.cancel()
    await asyncio.wait([running])
    await state.close()
    print(  # noqa: T201
        f"{hours:g} h, {len(sink.delivered)} records of {FORECAST_BYTES} bytes: "
        f"{grown:+.0f} MiB meanwhile, {resident_mib() - before:+.0f} MiB after"
    )
    assert sink.delivered == list(range(20 * seconds))
    assert max(grown, resident_mib() - before) < GROWTH_MIB


class _UnavailableSink:
    """A sink that is unavailable at first."""

    name = "gone"

    def __init__(self) -> None:
        self.available = False
        self.delivered: list[int] = []

    async def start(self) -> None: ...

    async def deliver(self, records: Sequence[Record]) -> Sequence[Refusal]:
        if not self.available:
            raise SinkUnavailable("no broker")
        self.delivered += [int(record.value.split()[0]) for record in records]
        return ()

    async def close(self) -> None: ...


class _ShiftedClock(SystemClock):
    """A clock that can be set wrong."""

    ahead_ms = 0

    def now(self) -> int:
        return super().now() + self.ahead_ms


def _outbox(state: State, sink: object, clock: Clock) -> Outbox:
    return Outbox(
        state,
        [sink],  # type: ignore[list-item]
        clock,
        Random(0),
        Metrics(),
        max_age_seconds=86_400.0,
    )


def _message(number: int, size: int) -> Envelope:
    value = (b"%d " % number).ljust(size, b".")
    return Envelope("forecast", f"binance:S{number % 4}/USDT:1s", value, (("ce_id", b"0"),))


def _wait_for_more(daemon: DaemonProcess) -> None:
    """Wait until three more forecasts per series are delivered."""
    enough = daemon.metric("kronos_delivered_total") + 3 * SYMBOLS
    wait_for("forecasts", lambda: daemon.metric("kronos_delivered_total") >= enough)


def _leader_port(bootstrap: str, topic: str) -> int:
    """Port of the leader of the topic's first partition."""
    described = Producer({"bootstrap.servers": bootstrap}).list_topics(topic, timeout=WAIT_SECONDS)
    return int(described.brokers[described.topics[topic].partitions[0].leader].port)


def _assert_nothing_is_lost(
    daemon: DaemonProcess, exchange: ExchangeProcess, bootstrap: str, prefix: str
) -> None:
    assert daemon.undelivered() == 0
    decided = daemon.outcome_range(exchange.series())
    due = {series: exchange.closed_bar_times(series, *span) for series, span in decided.items()}
    found = audit_forecasts(read_topic(bootstrap, forecast_topic(prefix)), due)
    assert found.problems == []
    assert len(due) == SYMBOLS
