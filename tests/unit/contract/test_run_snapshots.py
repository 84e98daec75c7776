"""Snapshots of a fixed run of the daemon: pages, records, state file and metrics."""

from __future__ import annotations

import asyncio
import re
import socket
import sqlite3
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import NamedTuple

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kronos_stream.daemon.config.environment import read_settings
from kronos_stream.daemon.config.settings import Settings
from kronos_stream.daemon.roles.standalone import StandaloneRole
from kronos_stream.daemon.storage.state import State
from kronos_stream.interfaces.sink import Record, Refusal
from kronos_stream.interfaces.source import SourceCallbacks, Traits
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.clock import ManualClock
from kronos_stream.market.series import Series
from tests.support.fake_worker import FakeWorker
from tests.support.snapshots import check_snapshot

_MINUTE = 60_000
_START = 1_718_712_000_000
_BTC, _ETH, _SOL = (Series.parse(f"binance:{base}/USDT:1m") for base in ("BTC", "ETH", "SOL"))
_GONE = "binance:GONE/USDT:1m"


class _MiddleOfRange(Random):
    """Random numbers that do not depend on how many were drawn before."""

    def random(self) -> float:
        return 0.5


class _Venue:
    """Twelve bars of history, then four minutes in which one bar is missing and one corrected."""

    venue = "binance"
    traits = Traits(grace_seconds=2.0, history_lag_seconds=0.0)

    def __init__(
        self, live: Callable[[SourceCallbacks], Awaitable[None]], clock: ManualClock
    ) -> None:
        self._live, self._clock = live, clock
        self.corrected: dict[tuple[Series, int], Candle] = {}

    async def unsupported(self, _: Collection[Series]) -> Mapping[Series, str]:
        return {}

    def subscribe(self, series: Collection[Series]) -> None:
        """Does nothing: every series is pushed."""

    async def run(self, callbacks: SourceCallbacks) -> None:
        await self._live(callbacks)

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        if series == _SOL:
            return []
        first = _START - 12 * _MINUTE
        opens = range(max(first, start), min(end, self._clock.now() - _MINUTE + 1), _MINUTE)
        missing = _START + _MINUTE if series == _ETH else -1
        bars = [_bar(series, time) for time in opens if time != missing]
        return [self.corrected.get((series, one.time), one) for one in bars]

    async def close(self) -> None:
        """Does nothing."""


class _MemorySink:
    """A sink that keeps all records and refuses one forecast."""

    name = "jsonl"

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.dead_letter_received = asyncio.Event()
        """Set by a record without a key: the dead letter of a frame."""

    async def start(self) -> None:
        """Does nothing."""

    async def deliver(self, records: Sequence[Record]) -> Sequence[Refusal]:
        self.records += records
        if not all(record.key for record in records):
            self.dead_letter_received.set()
        refused = f'"series":"{_ETH.name}"', '"origin":"2024-06-18T12:02:00Z"'
        return [
            Refusal(record, "too large")
            for record in records
            if record.kind == "forecast" and all(part.encode() in record.value for part in refused)
        ]

    async def close(self) -> None:
        """Does nothing."""


class _Run(NamedTuple):
    """Output of the fixed run."""

    pages: dict[str, tuple[int, str, bytes]]
    records: list[Record]
    state_file: Path


def _bar(series: Series, time: int) -> Candle:
    number = (time - _START) // _MINUTE
    price = (100.0 if series == _BTC else 50.0) + number
    return Candle(time, price, price + 2, price - 1, price + 1, 5.0, 5.0 * price)


def _settings(folder: Path) -> Settings:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    variables = {
        "SYMBOLS": "binance:BTC/USDT,binance:ETH/USDT,binance:SOL/USDT",
        "TIMEFRAMES": "1m",
        "SINKS": "jsonl",
        "JSONL__PATH": str(folder / "unused.jsonl"),
        "STATE_FILE": str(folder / "state.sqlite"),
        "SECRETS_DIR": str(folder / "secrets"),
        "HTTP__PORT": str(port),
        "MODEL": "nano",
        "LOOKBACK": "8",
        "CATCH_UP": "all",
        "THREADS": "1",
        "DEVICE": "cpu",
    }
    return read_settings({f"KRONOS_STREAM_{name}": value for name, value in variables.items()})


class _FixedRun:
    """The daemon in this process, with a made-up model; time stands still between events."""

    def __init__(self, settings: Settings) -> None:
        self.pages: dict[str, tuple[int, str, bytes]] = {}
        """Status, content type and body by path, read after the last bar."""
        self.state_file = settings.state_file
        self._port = settings.http.port
        self._clock = ManualClock(_START)
        self._venue = _Venue(self._live, self._clock)
        self._sink = _MemorySink()
        self.daemon = StandaloneRole(
            settings,
            {"binance": self._venue},
            [self._sink],
            clock=self._clock,
            wall=self._clock,
            random=_MiddleOfRange(),
            worker_factory=lambda *_: FakeWorker(0.01),
        )

    @property
    def records(self) -> list[Record]:
        return self._sink.records

    async def _live(self, callbacks: SourceCallbacks) -> None:
        """Four minutes of pushes, a correction and a bad frame; the data end after that."""
        await self.daemon.drain()
        last = _START + 3 * _MINUTE
        for opened in range(_START, last + 1, _MINUTE):
            await self._pass_time(opened + _MINUTE + 250)
            for series in (_BTC, _ETH):
                if series == _BTC or opened != _START + _MINUTE:
                    self._push(callbacks, series, _bar(series, opened))
        await self._pass_time(last + _MINUTE + 500)
        corrected = _bar(_BTC, last)._replace(close=103.5)
        self._venue.corrected[_BTC, last] = corrected
        self._push(callbacks, _BTC, corrected)
        await self._pass_time(last + _MINUTE + 10_000)
        callbacks.reject(None, "not JSON", b'{"e": "kline')
        callbacks.count_event("connected")
        await self._sink.dead_letter_received.wait()
        await self.daemon.drain()
        await self._fetch_pages()

    def _push(self, callbacks: SourceCallbacks, series: Series, candle: Candle) -> None:
        callbacks.update(Update(series, candle, closed=True, received=self._clock.now()))

    async def _pass_time(self, moment: int) -> None:
        await self.daemon.drain()
        while (wake := self.daemon.next_timer) is not None and wake < moment:
            self._clock.advance(wake)
            await self.daemon.drain()
        self._clock.advance(moment)

    async def _fetch_pages(self) -> None:
        names = (_BTC.name, _ETH.name, _SOL.name, _GONE, "nonsense")
        paths = [f"forecasts/{name}" for name in names]
        async with aiohttp.ClientSession() as session:
            for path in [*paths, "series", "metrics", "readyz", "healthz", "nosuch"]:
                async with session.get(f"http://127.0.0.1:{self._port}/{path}") as answer:
                    body = await answer.read()
                    self.pages[path] = answer.status, answer.headers["Content-Type"], body


async def _run(folder: Path) -> _Run:
    run = _FixedRun(_settings(folder))
    await asyncio.wait_for(run.daemon.run(), 300)
    return _Run(run.pages, run.records, run.state_file)


async def _create_state_file(path: Path) -> None:
    state = await State.open(path)
    await state.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> _Run:
    """The run; the state file holds a series that the daemon no longer follows."""
    folder = tmp_path_factory.mktemp("run")
    asyncio.run(_create_state_file(folder / "state.sqlite"))
    with closing(sqlite3.connect(folder / "state.sqlite")) as file:
        file.execute("INSERT INTO series (name, followed) VALUES (?, 1)", (_GONE,))
        file.commit()
    return asyncio.run(_run(folder))


def test_pages(run: _Run) -> None:
    """Bodies, without error texts."""
    lines = []
    for path, (status, kind, body) in run.pages.items():
        text = re.sub(r'^{"error":".*"}$', '{"error":"(text)"}', body.decode()) + "\n"
        if path != "metrics":
            lines.append(f"## GET /{path}: {status} {kind}\n{_break_lines(text)}")
    check_snapshot("pages.txt", "".join(lines))
    newest = [one for one in run.records if one.kind == "forecast" and one.key == _BTC.name][-1]
    assert run.pages[f"forecasts/{_BTC.name}"][2] == newest.value


def test_records_of_the_run(run: _Run) -> None:
    lines = [
        f"## {one.kind} of {one.key!r}, created {one.created}\n"
        f"{dict(one.headers)}\n{_break_lines(one.value.decode())}\n"
        for one in run.records
    ]
    check_snapshot("run-records.txt", "".join(lines))


def test_state_file_of_the_run(run: _Run) -> None:
    """Rows by the name of their series, whose number is not fixed; all records are delivered."""
    lines: list[str] = []
    with closing(sqlite3.connect(run.state_file)) as file:
        for table in ("series", "bars", "outcomes", "outbox"):
            cursor = file.execute(f"SELECT * FROM {table}")  # noqa: S608 - a table's name
            lines.append(f"{table} ({', '.join(one[0] for one in cursor.description)})\n")
            names = dict(file.execute("SELECT id, name FROM series"))
            lines += sorted(f"{names[number]}: {rest}\n" for number, *rest in cursor)
    check_snapshot("run-state.txt", "".join(lines))


def test_metrics_of_the_run(run: _Run) -> None:
    """Samples of the page, without values: some of them depend on the machine."""
    families = text_string_to_metric_families(run.pages["metrics"][2].decode())
    names = {
        f"{sample.name} {sorted(sample.labels.items())}".replace(
            version("kronos-stream"), "(version)"
        )
        for family in families
        for sample in family.samples
        if re.fullmatch("kronos_.*(?<!_created)", sample.name) and "le" not in sample.labels
    }
    check_snapshot("run-metrics.txt", "".join(f"{name}\n" for name in sorted(names)))


def _break_lines(text: str) -> str:
    """JSON with a line break after each member."""
    return text.replace(',"', ',\n"')
