"""Logging: one line per event, in order, without secrets, without blocking."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TextIO

import pytest
import structlog
from pydantic import SecretStr

from kronos_stream.daemon.telemetry import logs
from kronos_stream.daemon.telemetry.logs import Format, Level, configure

_log = structlog.get_logger()

Start = Callable[[Format, Level], "_LogLines"]


class _LogLines:
    """Log to memory; calling it ends the logging and returns the lines."""

    def __init__(self, format_: Format, level: Level) -> None:
        self._stream = io.StringIO()
        self.end = configure(format_, level, self._stream)

    def __call__(self) -> list[str]:
        self.end()
        return self._stream.getvalue().splitlines()

    def parsed(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self()]


@pytest.fixture
def start() -> Iterator[Start]:
    root, started = logging.getLogger(), []
    level = root.level

    def start_logging(format_: Format, level: Level) -> _LogLines:
        started.append(_LogLines(format_, level))
        return started[-1]

    yield start_logging
    for lines in started:
        lines.end()
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_json_has_one_object_per_line_with_bound_values(start: Start) -> None:
    lines = start("json", "info")
    with structlog.contextvars.bound_contextvars(series="binance:BTC/USDT:5m", batch=7):
        _log.info("batch computed", seconds=0.25)
    _log.debug("below the level")
    _log.warning("two\nlines", why=ValueError("odd"), password=SecretStr("hunter2"))
    first, second = lines.parsed()
    assert first.pop("time")
    assert first == {
        "event": "batch computed",
        "level": "info",
        "series": "binance:BTC/USDT:5m",
        "batch": 7,
        "seconds": 0.25,
    }
    assert (second["event"], second["why"]) == ("two\nlines", "odd")
    assert second["password"] == "**********"  # noqa: S105 - stars


def test_console_lines_are_readable(start: Start) -> None:
    lines = start("console", "debug")
    _log.debug("connected", venue="binance")
    (line,) = lines()
    assert "connected" in line
    assert "venue=binance" in line
    assert "\x1b" not in line  # no colours, as it is no terminal


@pytest.mark.parametrize("format_", ["console", "json"])
def test_exceptions_are_logged_with_traceback(start: Start, format_: Format) -> None:
    lines = start(format_, "info")
    try:
        raise ZeroDivisionError("by nothing")  # noqa: TRY301
    except ZeroDivisionError:
        _log.exception("task failed", task="intake")
    text = "\n".join(lines())
    assert "task failed" in text
    assert "ZeroDivisionError: by nothing" in text
    assert "test_exceptions_are_logged" in text


def test_libraries_are_logged_in_the_same_format_but_from_warning(start: Start) -> None:
    lines = start("json", "debug")
    logging.getLogger("websockets.client").info("connected to %s", "broker")
    logging.getLogger("websockets.client").error("broker %d is gone", 3)
    logging.getLogger("somebody").info("hello")
    warnings.warn("old ways", stacklevel=1)
    logged = [(line["event"], line.get("logger"), line["level"]) for line in lines.parsed()]
    assert logged[:2] == [
        ("broker 3 is gone", "websockets.client", "error"),
        ("hello", "somebody", "info"),
    ]
    assert "old ways" in str(logged[2][0])


@pytest.mark.parametrize("format_", ["console", "json"])
def test_passwords_in_urls_are_masked(start: Start, format_: Format) -> None:
    lines = start(format_, "info")
    _log.info("connecting", url="mqtt://me:h3r-m4j3sty@broker:1883/x")
    _log.info("see mqtt://me:h3r-m4j3sty@broker")
    logging.getLogger("lib").warning("failed: %s", "https://:h3r-m4j3sty@proxy/")
    _log.info("untouched", url="wss://data-stream.binance.vision:9443/ws?a=b@c")
    text = "\n".join(lines())
    assert "h3r-m4j3sty" not in text
    assert text.count(":***@") == 3
    assert "wss://data-stream.binance.vision:9443/ws?a=b@c" in text


@pytest.fixture
def pipe() -> Iterator[tuple[TextIO, TextIO]]:
    """Reading and writing end of a pipe."""
    read, write = os.pipe()
    reader, writer = os.fdopen(read), os.fdopen(write, "w")
    yield reader, writer
    reader.close()  # first, which unblocks a writer
    with suppress(BrokenPipeError):
        writer.close()


@pytest.mark.usefixtures("start")  # restores the logging
def test_slow_reader_does_not_block_and_learns_how_many_lines_were_dropped(
    pipe: tuple[TextIO, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_MAX_QUEUED_LINES", 50)
    reader, writer = pipe
    end = configure("json", "info", writer)
    for number in range(1000):
        _log.info("x" * 1000, number=number)
    received: list[int] = []
    dropped = 0
    while len(received) + dropped <= 1000:
        line = json.loads(reader.readline())
        if "number" in line:
            received.append(line["number"])
        else:
            assert line["event"] == "log lines dropped"
            dropped += line["lines"]
        if len(received) == 40 and received[-1] == line.get("number"):
            time.sleep(0.2)  # until there is room again
            _log.info("", number=1000)
    assert received == sorted(set(received))
    assert received[-1] == 1000
    assert dropped > 500
    end()


def test_blocked_reader_does_not_prevent_the_exit() -> None:
    code = (
        "import structlog; from kronos_stream.daemon.telemetry.logs import configure\n"
        "configure('json', 'info')\n"
        "for _ in range(100): structlog.get_logger().info('x' * 10_000)\n"
        "print('done', flush=True)"
    )
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        assert process.wait(300) == 0


def test_last_line_before_the_exit_is_written() -> None:
    code = (
        "import structlog; from kronos_stream.daemon.telemetry.logs import configure\n"
        "configure('json', 'info'); structlog.get_logger().info('stopped')"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert json.loads(done.stderr)["event"] == "stopped"
    assert not done.stdout
