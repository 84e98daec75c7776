"""The demo as a user starts it, and an independent consumer of its topic."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from kronos_stream.market.utc import parse_time

SOAK_SECONDS = os.environ.get("KRONOS_SOAK_SECONDS", "60")
BAR_MS = 1_000

# Consumes records until it is killed, and prints key and value, a line each.
READER = """
import sys
from confluent_kafka import Consumer
consumer = Consumer({"bootstrap.servers": sys.argv[1], "group.id": "reader",
                     "auto.offset.reset": "earliest", "enable.auto.commit": False})
consumer.subscribe(["kronos.forecasts.v1"])
while True:
    message = consumer.poll(1)
    if message is not None and not message.error():
        print(message.key().decode(), message.value().decode(), sep="\\t", flush=True)
"""


class ReceivedRecord(NamedTuple):
    """A record as a consumer received it."""

    time: float
    """Seconds, monotonic."""
    key: str
    forecast: dict[str, Any]


class DemoResult(NamedTuple):
    """Figures and forecasts of a demo."""

    figures: dict[str, Any]
    records: list[ReceivedRecord]
    seconds_to_first: float


@pytest.mark.parametrize(
    "seconds",
    [
        "10",
        pytest.param(
            SOAK_SECONDS, marks=[pytest.mark.soak, pytest.mark.timeout(300 + int(SOAK_SECONDS))]
        ),
    ],
)
def test_consumer_receives_the_forecasts_of_the_figures(seconds: str, tmp_path: Path) -> None:
    result = _demo(tmp_path, "--seconds", seconds)
    assert Counter(record.key for record in result.records) == result.figures["by_series"]
    assert len(result.figures["by_series"]) == 20
    assert len(result.records) == result.figures["outcomes"]["forecast"]
    missing = 0
    for opens in _origins(result.records).values():
        assert opens == sorted(set(opens))  # in order, without duplicates
        missing += (opens[-1] - opens[0]) // BAR_MS + 1 - len(opens)
    # One forecast per series and second; those that a busy machine skipped have an outcome.
    assert missing <= sum(result.figures["outcomes"].values()) - len(result.records)
    print(  # noqa: T201
        f"first forecast consumed after {result.seconds_to_first:.1f} s, {len(result.records)} "
        f"in all, {missing} missing; {result.figures['received_to_published_ms']}"
    )


def test_demo_replays_real_candles(tmp_path: Path) -> None:
    closes = _write_candles(tmp_path / "BTCUSDT-1s.csv")
    result = _demo(tmp_path, "--seconds", "8", "--candles", str(tmp_path / "BTCUSDT-1s.csv"))
    assert list(result.figures["by_series"]) == ["binance:BTC/USDT:1s"]
    lasts = [record.forecast["last"]["close"] for record in result.records]
    assert len(lasts) >= 2
    # They are consecutive in the file.
    assert any(closes[i : i + len(lasts)] == lasts for i in range(len(closes)))


def _demo(folder: Path, *arguments: str) -> DemoResult:
    began = time.monotonic()
    demo = subprocess.Popen(
        [sys.executable, "-m", "kronos_stream", "demo", "--json", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert demo.stderr is not None
    try:
        bootstrap = next(_bootstraps(demo.stderr))
        threading.Thread(target=demo.stderr.read, daemon=True).start()
        with subprocess.Popen(_reader(bootstrap), stdout=subprocess.PIPE, text=True) as reader:
            records: list[ReceivedRecord] = []
            reading = threading.Thread(target=_read, args=(reader, records))
            reading.start()
            figures, _ = demo.communicate()
            reader.kill()
            reading.join()
    finally:
        demo.kill()
        demo.communicate()
    assert demo.returncode == 0
    return DemoResult(json.loads(figures), records, records[0].time - began)


def _bootstraps(lines: Iterator[str]) -> Iterator[str]:
    lines_so_far = []
    for line in lines:
        lines_so_far.append(line)
        if found := re.search(r"Kafka listens at (\S+?)\.?\s", line):
            yield found[1]
    pytest.fail(f"the demo named no broker: {lines_so_far}")


def _reader(bootstrap: str) -> list[str]:
    if shutil.which("kcat"):
        options = ["-q", "-u", "-o", "beginning", "-f", "%k\t%s\n"]
        return ["kcat", "-C", "-b", bootstrap, "-t", "kronos.forecasts.v1", *options]
    return [sys.executable, "-c", READER, bootstrap]


def _read(reader: subprocess.Popen[str], records: list[ReceivedRecord]) -> None:
    assert reader.stdout is not None
    for line in reader.stdout:
        key, _, value = line.partition("\t")
        records.append(ReceivedRecord(time.monotonic(), key, json.loads(value)))


def _origins(records: list[ReceivedRecord]) -> dict[str, list[int]]:
    """Origins of each series, in the order of arrival."""
    opens = defaultdict(list)
    for record in records:
        opens[record.key].append(parse_time(record.forecast["origin"]))
    return opens


def _write_candles(path: Path) -> list[float]:
    """Write 400 one-second bars, and return their closes."""
    random = np.random.default_rng(0)
    closes = np.round(100 * np.exp(random.normal(0, 0.001, 400).cumsum()), 2)
    lines = ["timestamp,open,high,low,close,volume"]
    for i, close in enumerate(closes):
        opened = closes[max(0, i - 1)]
        high, low = max(opened, close), min(opened, close)
        lines.append(f"{1_700_000_000_000 + i * BAR_MS},{opened},{high},{low},{close},1.5")
    path.write_text("\n".join(lines), "utf-8")
    return [float(close) for close in closes]
