"""``kronos-stream tail`` as a user meets it: on a terminal, in a pipe, and waiting in vain."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
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
from rich.console import Console

from kronos_connectors.kafka.admin import create
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import forecast_topic, required_topics
from kronos_stream.commands import _forecast_table, _tail
from kronos_stream.commands._forecast_table import ForecastTable
from kronos_stream.forecast.message import Forecast
from kronos_stream.market.utc import rfc3339
from kronos_stream.testing.broker import EmbeddedBroker
from tests.support.apache_kafka import ApacheKafka

BTC, ETH = "binance:BTC/USDT:1m", "binance:ETH/USDT:1m"
MINUTE = 60_000
START = 1_718_709_300_000
_COMMAND = [sys.executable, "-m", "kronos_stream", "tail"]
_SECONDS = 300.0


def _forecast(
    series: str = BTC,
    origin: int = START,
    *,
    bands: Sequence[str] = ("q05", "q50", "q95"),
    **x: Any,
) -> Forecast:
    venue, symbol, timeframe = series.split(":")
    closes = {"mean": (7.0, 8.0), **{name: (1.0, float(name[1:])) for name in bands}}
    given: dict[str, Any] = {
        "schema": "kronos.forecast/1",
        "id": f"{series}/{origin}",
        "series": series,
        "venue": venue,
        "symbol": symbol,
        "timeframe": timeframe,
        "origin": rfc3339(origin),
        "revision": 0,
        "valid_until": rfc3339(origin + 2 * MINUTE),
        "created_at": rfc3339(origin + MINUTE),
        "degraded": False,
        "model": {"name": "nano", "revision": "1", "tokenizer": "nano"},
        "engine": {"version": "0.1.0", "device": "cpu", "dtype": "float32"},
        "sampling": {
            **dict.fromkeys(("temperature", "top_k", "top_p", "seed"), 1),
            "paths": 20,
            "anchor": True,
        },
        "context": {
            "bars": 96,
            "first": rfc3339(START),
            "synthetic": 0,
            "amount": "reported",
            "digest": "00",
        },
        "last": {"open": 1, "high": 1, "low": 1, "close": 42.5, "volume": 1},
        "times": [rfc3339(origin + MINUTE), rfc3339(origin + 2 * MINUTE)],
        **dict.fromkeys(("close", "open", "high", "low", "volume"), closes),
        "summary": {
            "p_up": 0.625,
            "expected_return": 0,
            "return_quantiles": {},
            "volatility": 0.00123,
            "value_at_risk_95": 0,
        },
        "repaired": 0,
        "latency_ms": {"close_to_received": 300, "queued": 1, "compute": 10},
    }
    return Forecast.model_validate({**given, **x})


def _now() -> int:
    return time.time_ns() // 1_000_000


async def _publish(
    bootstrap: str, made: Sequence[Forecast], prefix: str, **connection: Any
) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, **connection)
    await producer.start()
    try:
        for one in made:
            await producer.send_and_wait(forecast_topic(prefix), one.encode(), one.series.encode())
    finally:
        await producer.stop()


def _drawn(
    board: ForecastTable, now: int, height: int = 30, *, width: int = 140, color: bool = False
) -> str:
    console = Console(width=width, force_terminal=color, color_system="standard" if color else None)
    with console.capture() as captured:
        console.print(board.render(now, width, height))
    return captured.get()


def _rows(drawn: str) -> list[list[str]]:
    found = [[cell.strip() for cell in line.split("│")[1:-1]] for line in drawn.splitlines()]
    return [row for row in found if row]


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_where_there_is_little_room_columns_go_and_no_name_or_number_is_cut(width: int) -> None:
    board = ForecastTable("here", newest_first=False)
    board.add(_forecast(BTC))
    (row,) = _rows(_drawn(board, START, width=width))
    assert row[0] == BTC
    assert "…" not in "".join(row)
    assert "50" in row, "the median"
    assert len(row) == {60: 6, 80: 8, 100: 9, 120: 9}[width]


def test_a_row_tells_what_the_newest_forecast_of_a_series_says() -> None:
    board = ForecastTable("here", newest_first=False)
    for origin in (START, START + MINUTE, START):
        board.add(_forecast(ETH, origin))
    board.add(_forecast(BTC, degraded=True))
    drawn = _drawn(board, START + 90_000)
    assert "here: 4 forecasts of 2 series" in drawn
    assert [name.split() for name in re.findall(r"q\d+", drawn)] == [["q05"], ["q50"], ["q95"]]
    assert _rows(drawn) == [
        [BTC, "06-18 11:15:00", "42.5", "5", "50", "95", "0.62", "0.123%", "30 s", "degraded"],
        [ETH, "06-18 11:16:00", "42.5", "5", "50", "95", "0.62", "0.123%", "0 s", ""],
    ]


def test_an_expired_forecast_is_dim() -> None:
    board = ForecastTable("here", newest_first=False)
    board.add(_forecast(BTC))
    board.add(_forecast(ETH, START + MINUTE))
    lines = _drawn(board, START + 2 * MINUTE, color=True).splitlines()
    assert {
        name: any("\x1b[2m" in one and name in one for one in lines) for name in (BTC, ETH)
    } == {
        BTC: True,
        ETH: False,
    }


def test_rows_are_in_order_and_as_many_as_there_is_room_for() -> None:
    names = [f"binance:S{i:02}/USDT:1m" for i in range(20)]
    for newest_first in (False, True):
        board = ForecastTable("here", newest_first=newest_first)
        for i, name in enumerate(names):
            board.add(_forecast(name, START + i * MINUTE))
        shown = [row[0] for row in _rows(_drawn(board, START, height=11))]
        assert shown == (names[:-6:-1] if newest_first else names[:5])
        drawn = _drawn(board, START, height=11)
        assert "and 15 more" in drawn
        assert len(drawn.splitlines()) <= 11


@pytest.mark.parametrize(
    ("bands", "shown"),
    [
        (("q05", "q25", "q50", "q75", "q95"), ("q05", "q50", "q95")),
        (("q01", "q99"), ("q01", "mean", "q99")),
        (("q10", "q50", "q90"), ("q10", "q50", "q90")),
    ],
)
def test_bands_are_the_usual_or_the_outermost(bands: Sequence[str], shown: Sequence[str]) -> None:
    made = _forecast(bands=bands)
    assert _forecast_table.band_names(made) == shown
    board = ForecastTable("here", newest_first=False)
    board.add(made)
    assert all(name in _drawn(board, START) for name in shown)
    board.add(_forecast(ETH, bands=("q20", "q80")))
    assert all(name in _drawn(board, START) for name in ("low", "middle", "high"))
    assert "mean" not in _forecast_table.format_line(_forecast(bands=("q50",)))


@pytest.mark.parametrize(
    ("seconds", "age"), [(-5, "0 s"), (119, "119 s"), (120, "2 min"), (9_000, "2 h"), (2e6, "23 d")]
)
def test_ages_are_short(seconds: float, age: str) -> None:
    assert _forecast_table._format_age(1000 * seconds) == age


@contextmanager
def _process(*arguments: str, **settings: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a pipe."""
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


def test_in_a_pipe_it_prints_a_line_each_until_ctrl_c() -> None:
    made = [_forecast(BTC), _forecast(ETH), _forecast(BTC, START + MINUTE, degraded=True)]
    with EmbeddedBroker([forecast_topic("kronos")]) as broker:
        asyncio.run(_publish(broker.bootstrap, made, "kronos"))
        with _process(broker.bootstrap, "--from-start", "--series", BTC) as process:
            first, second = _lines(process, 2)
            process.send_signal(signal.SIGINT)
            printed, said = process.communicate(timeout=_SECONDS)
        assert process.returncode == 130
        assert printed == ""
        assert said.strip() == f"Reading kronos.forecasts.v1 at {broker.bootstrap}; Ctrl-C ends"
        with _process(broker.bootstrap, "--from-start", "--json") as process:
            records = [json.loads(line) for line in _lines(process, 3)]
    assert first == (
        "2024-06-18 11:15:00  binance:BTC/USDT:1m  last 42.5  in 2 bars 50 (q05 5, q95 95)"
        "  P(up) 0.62"
    )
    assert second.endswith("  degraded")
    assert sorted(record["id"] for record in records) == sorted(one.id for one in made)


def test_it_logs_in_as_the_daemon_does(kafka_jars: Path, tmp_path: Path) -> None:
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
            _publish(connection.pop("bootstrap_servers"), [_forecast()], "mine", **connection)
        )
        settings = {f"KAFKA__{name.upper()}": value for name, value in given.items()}
        with _process("--from-start", **settings) as process:
            assert BTC in _lines(process, 1)[0]
        with _process(**{**settings, "KAFKA__SASL_PASSWORD": "hunter2"}) as process:
            _, said = process.communicate(timeout=_SECONDS)
        assert process.returncode == 1
        assert "Authentication failed" in said
        assert "hunter2" not in said


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        ((), 2, "KRONOS_STREAM_KAFKA__BOOTSTRAP_SERVERS"),
        (("127.0.0.1:1",), 1, "127.0.0.1:1"),
        (("127.0.0.1:1", "--series", "BTC"), 2, "venue:symbol:timeframe"),
        (("127.0.0.1:1", "--prefix", "a b"), 2, "pattern"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: Sequence[str], status: int, named: str) -> None:
    with _process(*arguments) as process:
        _, said = process.communicate(timeout=_SECONDS)
    assert process.returncode == status
    assert named in said
    assert len([line for line in said.splitlines() if "error" in line]) == 1
    assert "Traceback" not in said


def test_waiting_in_vain_it_says_what_for(kafka: ApacheKafka, topic_prefix: str) -> None:
    began = time.monotonic()
    with _process(kafka.bootstrap, "--prefix", topic_prefix, "--series", BTC) as process:
        assert process.stderr is not None
        said = [process.stderr.readline() for _ in range(2)][1]
        assert time.monotonic() - began > _tail._WAITING_NOTICE_SECONDS
        assert all(part in said for part in (BTC, forecast_topic(topic_prefix), kafka.bootstrap))
        _, rest = process.communicate(timeout=_SECONDS)
    assert process.returncode == 1
    assert f"no topic {forecast_topic(topic_prefix)}" in rest
    assert "kronos-stream topics create" in rest


def test_on_a_terminal_it_is_a_table_until_ctrl_c() -> None:
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
            asyncio.run(_publish(broker.bootstrap, [_forecast(BTC, _now() - MINUTE)], "kronos"))
            assert "0.123%" in _read(terminal, "1 forecasts of 1 series", "0.123%")
            asyncio.run(_publish(broker.bootstrap, [_forecast(ETH, _now() - MINUTE)], "kronos"))
            _read(terminal, "2 forecasts of 2 series", ETH)
            process.send_signal(signal.SIGINT)
            rest = _read(terminal)
            assert process.wait(_SECONDS) == 130
            assert "Traceback" not in rest
        finally:
            process.kill()
            process.wait()
            os.close(terminal)


def _read(terminal: int, *wanted: str) -> str:
    """What is drawn, up to where all that is wanted has been; without, to the end."""
    deadline, text = time.monotonic() + _SECONDS, ""
    while not wanted or not all(one in text for one in wanted):
        if not select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
            pytest.fail(f"not drawn in time: {wanted}, but {text[-2000:]!r}")
        try:
            more = os.read(terminal, 65_536)
        except OSError:  # the other end is closed
            more = b""
        if not more:
            assert not wanted, text[-2000:]
            return text
        text += more.decode(errors="replace")
    return text
