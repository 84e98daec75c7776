"""Logs: one line each, in order, without passwords, and never in the way."""

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

Start = Callable[[Format, Level], "_Lines"]


class _Lines:
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
    root, begun = logging.getLogger(), []
    level = root.level

    def begin(format_: Format, level: Level) -> _Lines:
        begun.append(_Lines(format_, level))
        return begun[-1]

    yield begin
    for lines in begun:
        lines.end()
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_json_is_an_object_per_line_with_what_is_bound(start: Start) -> None:
    lines = start("json", "info")
    with structlog.contextvars.bound_contextvars(series="binance:BTC/USDT:5m", batch=7):
        _log.info("batch computed", seconds=0.25)
    _log.debug("not asked for")
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


def test_console_is_for_people(start: Start) -> None:
    lines = start("console", "debug")
    _log.debug("connected", venue="binance")
    (line,) = lines()
    assert "connected" in line
    assert "venue=binance" in line
    assert "\x1b" not in line  # no terminal, no colours


@pytest.mark.parametrize("format_", ["console", "json"])
def test_failures_show_where_they_came_from(start: Start, format_: Format) -> None:
    lines = start(format_, "info")
    try:
        raise ZeroDivisionError("by nothing")  # noqa: TRY301
    except ZeroDivisionError:
        _log.exception("task failed", task="desk")
    text = "\n".join(lines())
    assert "task failed" in text
    assert "ZeroDivisionError: by nothing" in text
    assert "test_failures_show_where" in text


def test_libraries_speak_in_the_same_form_but_only_when_it_matters(start: Start) -> None:
    lines = start("json", "debug")
    logging.getLogger("websockets.client").info("everyday %s", "life")
    logging.getLogger("websockets.client").error("broker %d is gone", 3)
    logging.getLogger("somebody").info("hello")
    warnings.warn("old ways", stacklevel=1)
    said = [(line["event"], line.get("logger"), line["level"]) for line in lines.parsed()]
    assert said[:2] == [
        ("broker 3 is gone", "websockets.client", "error"),
        ("hello", "somebody", "info"),
    ]
    assert "old ways" in str(said[2][0])


@pytest.mark.parametrize("format_", ["console", "json"])
def test_passwords_in_urls_are_taken_out(start: Start, format_: Format) -> None:
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
    """A pipe's ends, to read and to write; nobody reads unless asked."""
    read, write = os.pipe()
    reader, writer = os.fdopen(read), os.fdopen(write, "w")
    yield reader, writer
    reader.close()  # first, so that whoever is stuck in writing is not
    with suppress(BrokenPipeError):
        writer.close()


@pytest.mark.usefixtures("start")  # which puts things back
def test_a_reader_that_is_slow_holds_up_nobody_and_hears_what_it_missed(
    pipe: tuple[TextIO, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_MAX_QUEUED_LINES", 50)
    reader, writer = pipe
    end = configure("json", "info", writer)
    for number in range(1000):
        _log.info("x" * 1000, number=number)
    heard: list[int] = []
    dropped = 0
    while len(heard) + dropped <= 1000:
        line = json.loads(reader.readline())
        if "number" in line:
            heard.append(line["number"])
        else:
            assert line["event"] == "log lines dropped"
            dropped += line["lines"]
        if len(heard) == 40 and heard[-1] == line.get("number"):
            time.sleep(0.2)  # there is room again
            _log.info("", number=1000)
    assert heard == sorted(set(heard))
    assert heard[-1] == 1000
    assert dropped > 500
    end()


def test_a_reader_that_is_stuck_does_not_hold_up_the_end() -> None:
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


def test_the_last_line_before_the_end_is_written() -> None:
    code = (
        "import structlog; from kronos_stream.daemon.telemetry.logs import configure\n"
        "configure('json', 'info'); structlog.get_logger().info('stopped')"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert json.loads(done.stderr)["event"] == "stopped"
    assert not done.stdout
