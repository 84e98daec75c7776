"""Status pages under load and abuse, while no bar is late.

As a program this file produces the load: ``test_status_pages.py PORT TOKEN RATE SECONDS SERIES…``.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

import pytest
from jsonschema import Draft202012Validator
from prometheus_client.parser import text_string_to_metric_families

from kronos_stream.daemon.status import openapi
from kronos_stream.forecast.message import Forecast
from tests.support.daemon_process import DaemonProcess, MetricSamples, p99
from tests.support.exchange_process import ExchangeProcess
from tests.support.paths import ROOT
from tests.support.processes import WAIT_SECONDS, wait_for

TOKEN = "only-for-this-test-1"  # noqa: S105
SYMBOLS = 8
CONNECTIONS = 40
"""Connections that request pages; the daemon accepts 64."""
ABUSERS = 20
LATER_SECONDS = 0.1
"""Delay allowed for the 99th percentile of all bars, compared with no load."""
LAG_SECONDS = 0.05
SOAK_SECONDS = float(os.environ.get("KRONOS_SOAK_PAGES_SECONDS", "120"))


@pytest.fixture(scope="module")
def exchange() -> Iterator[ExchangeProcess]:
    with ExchangeProcess("--symbols", str(SYMBOLS), "--history", "300") as exchange:
        yield exchange


def _settings(exchange: ExchangeProcess, folder: Path) -> dict[str, str]:
    return {
        **exchange.settings(),
        "SINKS": "jsonl",
        "JSONL__PATH": str(folder / "forecasts.jsonl"),
        "MODEL": "nano",
        "LOOKBACK": "96",
        "HORIZON": "8",
        "PATHS": "20",
        "HTTP__TOKEN": TOKEN,
    }


@pytest.fixture
def daemon(exchange: ExchangeProcess, tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon that is ready, and writes forecasts of one-second bars to a file."""
    with DaemonProcess(tmp_path, _settings(exchange, tmp_path)) as daemon:
        daemon.start()
        daemon.wait_until_ready()
        wait_for("forecasts", lambda: len(_forecasts(tmp_path)) >= 3 * SYMBOLS)
        yield daemon


def test_pages_show_the_work_of_the_daemon(
    daemon: DaemonProcess, exchange: ExchangeProcess, tmp_path: Path
) -> None:
    for path in ("/metrics", "/series", "/openapi.json", "/forecasts/x"):
        assert _get(daemon, path, "wrong-token-of-someone")[0] == _get(daemon, path, "")[0] == 401
    assert _get(daemon, "/readyz", "")[0] == _get(daemon, "/healthz", "")[0] == 200

    status, body = _get(daemon, "/series")
    page = json.loads(body)
    assert status == 200
    document = openapi.document()
    schema = {"$ref": "#/components/schemas/AllSeries", "components": document["components"]}
    assert list(Draft202012Validator(schema).iter_errors(page)) == []
    names = [one.name for one in exchange.series()]
    assert [row["series"] for row in page["series"]] == names
    assert {row["state"] for row in page["series"]} == {"live"}
    assert all(row["last_outcome"]["result"] == "forecast" for row in page["series"])

    for path in (names[0], quote(names[0]), quote(names[0], safe="")):
        status, body = _get(daemon, f"/forecasts/{path}")
        assert status == 200
        assert Forecast.parse(body).series == names[0]
        forecast_id = json.loads(body)["id"]
        wait_for("the file has it", lambda forecast_id=forecast_id: forecast_id in _ids(tmp_path))  # type: ignore[misc]
    assert _get(daemon, "/forecasts/binance:NONE/USDT:1s")[0] == 404


def test_doctor_finds_the_running_daemon(daemon: DaemonProcess) -> None:
    daemon.readiness()  # finds its port
    environ = daemon._environ | {"KRONOS_STREAM_HTTP__PORT": str(daemon._port)}
    command = [sys.executable, "-m", "kronos_stream", "doctor", "--json", "--skip", "model"]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    found = [one["found"] for one in json.loads(ended.stdout)["findings"]]
    assert ended.returncode == 0, ended.stdout
    assert any(f"in use by process {daemon.pid}, a daemon" in one for one in found)
    assert f"127.0.0.1:{daemon._port} is used by the running daemon" in found
    assert daemon.is_ready()


@pytest.mark.parametrize(
    ("rate", "seconds", "timed"),
    [
        pytest.param(200, 8.0, False, id="short"),
        pytest.param(
            1_000, SOAK_SECONDS, True, id="full",
            marks=[pytest.mark.soak, pytest.mark.timeout(3 * SOAK_SECONDS + 300)],
        ),
    ],
)  # fmt: skip
def test_load_on_the_pages_delays_no_bar(
    rate: int,
    seconds: float,
    timed: bool,  # noqa: FBT001
    daemon: DaemonProcess,
    exchange: ExchangeProcess,
    tmp_path: Path,
) -> None:
    daemon.readiness()  # finds its port
    began, start = time.time(), _metrics(daemon)
    time.sleep(seconds)
    calm, before = time.time(), _metrics(daemon)
    names = [one.name for one in exchange.series()]
    command = [sys.executable, __file__, str(daemon._port), TOKEN, str(rate), str(seconds), *names]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}  # for tests.support
    load = json.loads(subprocess.check_output(command, env=environ))
    after, end = _metrics(daemon), time.time()
    assert daemon.is_ready()
    assert daemon.stop() == 0

    made = _forecasts(tmp_path)
    alone = _lateness(made, began, calm)
    loaded = _lateness(made, calm, end - 1)
    lag = p99("kronos_event_loop_lag_seconds", before, after)
    print(  # noqa: T201
        f"{load['answers'] / load['seconds']:.0f} requests/s for {load['seconds']:.0f} s, "
        f"statuses {load['statuses']}, answered within {1000 * load['p99']:.0f} ms (p99), "
        f"{load['abused']} abuses; bars from close to forecast, p50/p99/worst: alone "
        f"{_described(alone)}, loaded {_described(loaded)}; loop lag p99 "
        f"{1000 * p99('kronos_event_loop_lag_seconds', start, before):g} → {1000 * lag:g} ms; "
        f"{_cores(start, before):.2f} → {_cores(before, after):.2f} cores"
    )
    assert set(load["statuses"]) <= {"200", "401"}
    assert load["statuses"]["401"] > 0
    assert load["abused"] > 0
    # Every bar has its forecast, and in time.
    if timed:
        assert load["answers"] >= 0.9 * rate * seconds
        assert _skipped(after) == _skipped(start)
        assert len(loaded) >= SYMBOLS * (seconds - 3)
        assert _at(loaded, 0.99) <= _at(alone, 0.99) + LATER_SECONDS
        assert lag <= LAG_SECONDS


@pytest.mark.soak
def test_unreachable_venue_makes_the_daemon_unready(tmp_path: Path) -> None:
    with (
        ExchangeProcess("--symbols", "3", "--history", "300") as exchange,
        DaemonProcess(tmp_path, _settings(exchange, tmp_path)) as daemon,
    ):
        daemon.start()
        daemon.wait_until_ready()
        exchange.close()
        gone = time.monotonic()
        wait_for("the daemon is unready", lambda: daemon.readiness()[0] == 503)
        assert time.monotonic() - gone > 50  # a minute may pass without an update
        why = {
            name: check_result
            for name, check_result in daemon.readiness()[1].items()
            if check_result != "ok"
        }
        assert why == {"source binance": "no data for any of its 3 series"}
        rows = json.loads(_get(daemon, "/series")[1])["series"]
        assert {row["state"] for row in rows} == {"late"}
        assert daemon.stop() == 0


def _get(daemon: DaemonProcess, path: str, token: str = TOKEN) -> tuple[int, bytes]:
    daemon.readiness()
    url = f"http://127.0.0.1:{daemon._port}{path}"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as answer:  # noqa: S310
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def _forecasts(folder: Path) -> list[dict[str, Any]]:
    with suppress(FileNotFoundError):
        lines = (folder / "forecasts.jsonl").read_bytes().split(b"\n")[:-1]
        return [json.loads(line) for line in lines]
    return []


def _ids(folder: Path) -> set[str]:
    return {one["id"] for one in _forecasts(folder)}


def _lateness(made: Sequence[Mapping[str, Any]], since: float, until: float) -> list[float]:
    """Seconds from close to message of the forecasts made between two times, sorted."""
    seen = [Forecast.model_validate(one) for one in made]
    late = [
        (one.created_at - one.times[0]).total_seconds()
        for one in seen
        if since <= one.created_at.timestamp() < until
    ]
    return sorted(late)


def _at(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]


def _described(late: Sequence[float]) -> str:
    return "/".join(f"{1000 * one:.0f}" for one in (_at(late, 0.5), _at(late, 0.99), late[-1]))


def _metrics(daemon: DaemonProcess) -> MetricSamples:
    ticks = Path(f"/proc/{daemon.pid}/stat").read_text("ascii").rpartition(")")[2].split()[11:13]
    text = _get(daemon, "/metrics")[1].decode()
    samples: MetricSamples = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    seconds = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return samples | {("cpu", frozenset()): seconds, ("at", frozenset()): time.monotonic()}


def _cores(before: MetricSamples, after: MetricSamples) -> float:
    """Cores used by the daemon's own process between two samples."""
    cpu, at = (after[name, frozenset()] - before[name, frozenset()] for name in ("cpu", "at"))
    return cpu / at


def _skipped(samples: MetricSamples) -> float:
    return sum(
        value
        for (name, labels), value in samples.items()
        if name == "kronos_outcomes_total" and ("result", "skipped") in labels
    )


# The load.


async def _run_load(
    port: int, token: str, rate: float, seconds: float, series: Sequence[str]
) -> None:
    """Request pages at a rate, with some abuse, and print the results as JSON."""
    statuses: Counter[str] = Counter()
    took: list[float] = []
    abused = [0]
    paths = ["/healthz", "/readyz", "/metrics", "/series", *(f"/forecasts/{one}" for one in series)]
    began = time.monotonic()
    end = began + seconds

    async def asker(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        due = began + number / rate
        for turn, path in enumerate(cycle(paths[number % len(paths) :] + paths)):
            if due >= end:
                break
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due += CONNECTIONS / rate
            shown = token if turn % 10 else "wrong"
            sent_at = time.monotonic()
            writer.write(
                f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {shown}\r\n\r\n".encode()
            )
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            await reader.readexactly(length)
            statuses[head[9:12].decode()] += 1
            took.append(time.monotonic() - sent_at)
        writer.close()

    async def abuser(number: int) -> None:
        random = Random(number)
        while time.monotonic() < end:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                if number % 2:  # never completes its request
                    writer.write(b"GET /series HTTP/1.1\r\nX-Slow: ")
                    await asyncio.sleep(min(3.0, max(0.0, end - time.monotonic())))
                else:
                    writer.write(random.randbytes(2_000))
                    await reader.read()
                    await asyncio.sleep(0.05)
                abused[0] += 1
                writer.close()

    async with asyncio.TaskGroup() as tasks:
        for number in range(CONNECTIONS):
            tasks.create_task(asker(number))
        for number in range(ABUSERS):
            tasks.create_task(abuser(number))
    took.sort()
    result = {
        "answers": sum(statuses.values()), "seconds": time.monotonic() - began,
        "statuses": dict(statuses), "p99": _at(took, 0.99), "abused": abused[0],
    }  # fmt: skip
    print(json.dumps(result))  # noqa: T201


if __name__ == "__main__":
    _port, _token, _rate, _seconds, *_series = sys.argv[1:]
    asyncio.run(_run_load(int(_port), _token, float(_rate), float(_seconds), _series))
