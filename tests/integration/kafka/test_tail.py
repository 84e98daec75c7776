"""``kronos-stream tail`` as a process: on a terminal, in a pipe, and without forecasts."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from kronos_connectors.kafka.admin import create
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import forecast_topic, required_topics
from kronos_stream.commands import _tail
from kronos_stream.forecast.message import Forecast
from kronos_stream.testing.broker import EmbeddedBroker
from tests.support.apache_kafka import ApacheKafka
from tests.support.forecast_messages import BTC, ETH, MINUTE, START, make_forecast_message
from tests.support.processes import WAIT_SECONDS

_COMMAND = [sys.executable, "-m", "kronos_stream", "tail"]


def _now() -> int:
    return time.time_ns() // 1_000_000


async def _publish(
    bootstrap: str, messages: Sequence[Forecast], prefix: str, **connection: Any
) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, **connection)
    await producer.start()
    try:
        for message in messages:
            value, key = message.encode(), message.series.encode()
            await producer.send_and_wait(forecast_topic(prefix), value, key)
    finally:
        await producer.stop()


@contextmanager
def _process(*arguments: str, **settings: str) -> Iterator[subprocess.Popen[str]]:
    """The command with pipes for its output."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("KRONOS_STREAM_")}
    process = subprocess.Popen(
        [*_COMMAND, *arguments],
        env={**environ, **{f"KRONOS_STREAM_{name}": value for name, value in settings.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _lines(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().strip() for _ in range(count)]


def test_pipe_gets_a_line_per_forecast_until_ctrl_c() -> None:
    messages = [
        make_forecast_message(BTC),
        make_forecast_message(ETH),
        make_forecast_message(BTC, START + MINUTE, degraded=True),
    ]
    with EmbeddedBroker([forecast_topic("kronos")]) as broker:
        asyncio.run(_publish(broker.bootstrap, messages, "kronos"))
        with _process(broker.bootstrap, "--from-start", "--series", BTC) as process:
            first, second = _lines(process, 2)
            process.send_signal(signal.SIGINT)
            printed, errors = process.communicate(timeout=WAIT_SECONDS)
        assert process.returncode == 130
        assert printed == ""
        assert errors.strip() == f"Reading kronos.forecasts.v1 at {broker.bootstrap}; Ctrl-C ends"
        with _process(broker.bootstrap, "--from-start", "--json") as process:
            records = [json.loads(line) for line in _lines(process, 3)]
    assert first == (
        "2024-06-18 11:15:00  binance:BTC/USDT:1m  last 42.5  in 2 bars 50 (q05 5, q95 95)"
        "  P(up) 0.62"
    )
    assert second.endswith("  degraded")
    assert sorted(record["id"] for record in records) == sorted(message.id for message in messages)


def test_login_is_the_daemons(kafka_jars: Path, tmp_path: Path) -> None:
    with ApacheKafka(kafka_jars, tmp_path, users={"kronos": "right"}) as kafka:
        given: dict[str, Any] = {
            "bootstrap_servers": kafka.bootstrap,
            "topic_prefix": "mine",
            "security_protocol": "SASL_PLAINTEXT",
            "sasl_username": "kronos",
            "sasl_password": "right",
        }
        options = KafkaOptions(**given)
        asyncio.run(create(options, required_topics(options)))
        connection = options.client_arguments()
        asyncio.run(
            _publish(
                connection.pop("bootstrap_servers"), [make_forecast_message()], "mine", **connection
            )
        )
        settings = {f"KAFKA__{name.upper()}": value for name, value in given.items()}
        with _process("--from-start", **settings) as process:
            assert BTC in _lines(process, 1)[0]
        with _process(**{**settings, "KAFKA__SASL_PASSWORD": "hunter2"}) as process:
            _, errors = process.communicate(timeout=WAIT_SECONDS)
        assert process.returncode == 1
        assert "Authentication failed" in errors
        assert "hunter2" not in errors


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        ((), 2, "KRONOS_STREAM_KAFKA__BOOTSTRAP_SERVERS"),
        (("127.0.0.1:1",), 1, "127.0.0.1:1"),
        (("127.0.0.1:1",), 1, "; check the address, and that a broker listens there"),
        (("nonsense",), 2, "error: expected host:port"),
        (("127.0.0.1:1", "--series", "BTC"), 2, "venue:symbol:timeframe"),
        (("127.0.0.1:1", "--prefix", "a b"), 2, "pattern"),
    ],
)
def test_bad_argument_is_one_line(arguments: Sequence[str], status: int, named: str) -> None:
    with _process(*arguments) as process:
        _, errors = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == status
    assert named in errors
    assert len([line for line in errors.splitlines() if "error" in line]) == 1
    assert "Traceback" not in errors


def test_waiting_notice_and_missing_topic(kafka: ApacheKafka, topic_prefix: str) -> None:
    began = time.monotonic()
    with _process(kafka.bootstrap, "--prefix", topic_prefix, "--series", BTC) as process:
        assert process.stderr is not None
        heading, notice = process.stderr.readline(), process.stderr.readline()
        assert time.monotonic() - began > _tail._WAITING_NOTICE_SECONDS
        assert heading.startswith("Reading ")
        assert all(part in notice for part in (BTC, forecast_topic(topic_prefix), kafka.bootstrap))
        _, rest = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 1
    assert f"no topic {forecast_topic(topic_prefix)}" in rest
    assert "kronos-stream topics create" in rest


def test_terminal_shows_a_table_until_ctrl_c() -> None:
    terminal, end = pty.openpty()
    with EmbeddedBroker([forecast_topic("kronos")]) as broker:
        process = subprocess.Popen(
            [*_COMMAND, broker.bootstrap],
            env={**os.environ, "COLUMNS": "140", "LINES": "20", "TERM": "xterm"},
            stdin=end,
            stdout=end,
            stderr=end,
            start_new_session=True,
        )
        os.close(end)
        try:
            _read(terminal, "0 forecasts of 0 series")
            asyncio.run(
                _publish(broker.bootstrap, [make_forecast_message(BTC, _now() - MINUTE)], "kronos")
            )
            assert "0.123%" in _read(terminal, "1 forecasts of 1 series", "0.123%")
            asyncio.run(
                _publish(broker.bootstrap, [make_forecast_message(ETH, _now() - MINUTE)], "kronos")
            )
            _read(terminal, "2 forecasts of 2 series", ETH)
            process.send_signal(signal.SIGINT)
            rest = _read(terminal)
            assert process.wait(WAIT_SECONDS) == 130
            assert "Traceback" not in rest
        finally:
            process.kill()
            process.wait()
            os.close(terminal)


def _read(terminal: int, *expected: str) -> str:
    """Read until all of ``expected`` has appeared; without any, to the end."""
    deadline, text = time.monotonic() + WAIT_SECONDS, ""
    while not expected or not all(part in text for part in expected):
        if not select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
            pytest.fail(f"not shown: {expected}, but {text[-2000:]!r}")
        try:
            more = os.read(terminal, 65_536)
        except OSError:  # the other end is closed
            more = b""
        if not more:
            assert not expected, text[-2000:]
            return text
        text += more.decode(errors="replace")
    return text
