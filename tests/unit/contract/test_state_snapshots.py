"""Snapshots of the state file and its upgrades, and of a fixed run: pages, records, state.

``data/state`` holds dumps of files of older versions. KRONOS_UPDATE_SNAPSHOTS=1 rewrites the
stored files in ``data/snapshots`` instead of comparing.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sqlite3
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from difflib import unified_diff
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kronos_stream.daemon.config.environment import read_settings
from kronos_stream.daemon.roles.standalone import StandaloneRole
from kronos_stream.daemon.storage.state import State
from kronos_stream.interfaces.sink import Record, Refusal
from kronos_stream.interfaces.source import Traits
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.clock import ManualClock
from kronos_stream.market.series import Series
from tests.support.fake_worker import FakeWorker
from tests.support.paths import DATA

_DATA = DATA
_SNAPSHOTS = _DATA / "snapshots"
_PREFIX = "KRONOS_STREAM_"
_DUMPS = sorted((_DATA / "state").glob("v*.sql"))


async def test_schema_of_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    await _open(path)
    _check("state-schema.txt", "".join(_schema(path)))


def test_every_older_version_has_a_dump(tmp_path: Path) -> None:
    versions = []
    for dump in _DUMPS:
        path = _restore(dump, tmp_path / f"{dump.stem}.sqlite")
        with closing(sqlite3.connect(path)) as file:
            versions += file.execute("PRAGMA user_version").fetchone()
    assert versions == [1, 2]


@pytest.mark.parametrize("dump", _DUMPS, ids=lambda path: path.stem)
async def test_upgrade_of_an_older_version(dump: Path, tmp_path: Path) -> None:
    """The upgraded file has the schema of a new one, and every row of the older version."""
    path = _restore(dump, tmp_path / "state.sqlite")
    before = dict(_tables(path))
    await _open(path)
    _check(f"state-upgrade-{dump.stem}.txt", "".join((*_schema(path), *_rows(path))))
    after = dict(_tables(path))
    await _open(tmp_path / "new.sqlite")
    new = dict(_tables(tmp_path / "new.sqlite"))
    assert [(name, one[0]) for name, one in after.items()] == [
        (name, one[0]) for name, one in new.items()
    ]
    for name, (columns, rows) in before.items():
        assert after[name][0][: len(columns)] == columns
        assert [row[: len(columns)] for row in after[name][1]] == rows
    await _open(path)  # and a second start changes nothing
    assert dict(_tables(path)) == after


async def _open(path: Path) -> None:
    """Open and close the file, as a start of the daemon does."""
    state = await State.open(path)
    await state.close()


def _restore(dump: Path, path: Path) -> Path:
    with closing(sqlite3.connect(path)) as file:
        file.executescript(dump.read_text("utf-8"))
    return path


def _schema(path: Path) -> Iterator[str]:
    """Version, application id, journal mode, and sqlite_master."""
    with closing(sqlite3.connect(path)) as file:
        for name in ("user_version", "application_id", "journal_mode"):
            yield f"{name}: {file.execute(f'PRAGMA {name}').fetchone()[0]}\n"
        query = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name"
        for kind, name, table, sql in file.execute(query):
            yield f"\n{kind} {name} of {table}\n{sql}\n"


def _rows(path: Path) -> Iterator[str]:
    for name, (columns, rows) in _tables(path):
        yield f"\n{name} ({', '.join(columns)}): {len(rows)} rows\n"
        yield from (f"{row!r}\n" for row in rows)


def _tables(path: Path) -> Iterator[tuple[str, tuple[list[str], list[tuple[object, ...]]]]]:
    """Each table's columns, and its rows in the order of all columns."""
    with closing(sqlite3.connect(path)) as file:
        query = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
        for (name,) in file.execute(query).fetchall():
            cursor = file.execute(f"SELECT * FROM {name}")  # noqa: S608 - a table's name
            columns = [column[0] for column in cursor.description]
            yield name, (columns, sorted(cursor.fetchall(), key=repr))


# A fixed run: three series of a venue; time stands still between events.

_MINUTE = 60_000
_START = 1_718_712_000_000
_BTC, _ETH, _SOL = (Series.parse(f"binance:{base}/USDT:1m") for base in ("BTC", "ETH", "SOL"))
_GONE = "binance:GONE/USDT:1m"


class _MiddleOfRange(Random):
    """No pause depends on how often anybody asked for a random number before."""

    def random(self) -> float:
        return 0.5


class _Venue:
    """Twelve bars of history, then four minutes in which one bar is missing and one corrected."""

    venue = "binance"
    traits = Traits(grace_seconds=2.0, history_lag_seconds=0.0)

    def __init__(self, live: Callable[[Any], Awaitable[None]], clock: ManualClock) -> None:
        self._live, self._clock = live, clock
        self.corrected: dict[tuple[Series, int], Candle] = {}

    async def unsupported(self, _: Collection[Series]) -> Mapping[Series, str]:
        return {}

    def subscribe(self, series: Collection[Series]) -> None:
        """All there is, is pushed."""

    async def run(self, callbacks: Any) -> None:
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
        """There is nothing to release."""


class _Memory:
    """A sink that keeps all records and refuses one forecast."""

    name = "jsonl"

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.letter = asyncio.Event()
        """Set when the dead letter of a frame, which has no key, is here."""

    async def start(self) -> None:
        """There is nothing to prepare."""

    async def deliver(self, records: Sequence[Record]) -> Sequence[Refusal]:
        self.records += records
        if not all(record.key for record in records):
            self.letter.set()
        refused = f'"series":"{_ETH.name}"', '"origin":"2024-06-18T12:02:00Z"'
        return [
            Refusal(record, "too large")
            for record in records
            if record.kind == "forecast" and all(part.encode() in record.value for part in refused)
        ]

    async def close(self) -> None:
        """There is nothing to release."""


class _Run(NamedTuple):
    """What was seen of the fixed run."""

    pages: dict[str, tuple[int, str, bytes]]
    records: list[Record]
    state_file: Path


def _bar(series: Series, time: int) -> Candle:
    number = (time - _START) // _MINUTE
    price = (100.0 if series == _BTC else 50.0) + number
    return Candle(time, price, price + 2, price - 1, price + 1, 5.0, 5.0 * price)


async def _run(folder: Path) -> _Run:
    """The daemon in this process, with a made-up model; pages are read after the last bar."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    told = {
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
    settings = read_settings({_PREFIX + name: value for name, value in told.items()})
    clock = ManualClock(_START)
    pages: dict[str, tuple[int, str, bytes]] = {}
    paths = [f"forecasts/{one}" for one in (_BTC.name, _ETH.name, _SOL.name, _GONE, "nonsense")]
    paths += ["series", "metrics", "readyz", "healthz", "nosuch"]
    last = _START + 3 * _MINUTE

    async def pass_time(moment: int) -> None:
        await daemon.drain()
        while (wake := daemon.next_timer) is not None and wake < moment:
            clock.advance(wake)
            await daemon.drain()
        clock.advance(moment)

    async def live(callbacks: Any) -> None:
        await daemon.drain()
        for opened in range(_START, last + 1, _MINUTE):
            await pass_time(opened + _MINUTE + 250)
            for series in (_BTC, _ETH):
                if series == _BTC or opened != _START + _MINUTE:
                    candle = _bar(series, opened)
                    callbacks.update(Update(series, candle, closed=True, received=clock.now()))
        await pass_time(last + _MINUTE + 500)
        corrected = _bar(_BTC, last)._replace(close=103.5)
        venue.corrected[_BTC, last] = corrected
        callbacks.update(Update(_BTC, corrected, closed=True, received=clock.now()))
        await pass_time(last + _MINUTE + 10_000)
        callbacks.reject(None, "not JSON", b'{"e": "kline')
        callbacks.note("connected")
        await sink.letter.wait()
        await daemon.drain()
        async with aiohttp.ClientSession() as session:
            for path in paths:
                async with session.get(f"http://127.0.0.1:{port}/{path}") as answer:
                    body = await answer.read()
                    pages[path] = answer.status, answer.headers["Content-Type"], body

    sink, venue = _Memory(), _Venue(live, clock)
    daemon = StandaloneRole(
        settings,
        {"binance": venue},
        [sink],
        clock=clock,
        wall=clock,
        random=_MiddleOfRange(),
        worker_factory=lambda *_: FakeWorker(0.01),
    )
    await asyncio.wait_for(daemon.run(), 120)
    return _Run(pages, sink.records, settings.state_file)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> _Run:
    """The run; before it, another series was followed that is not any more."""
    folder = tmp_path_factory.mktemp("run")
    asyncio.run(_open(folder / "state.sqlite"))
    with closing(sqlite3.connect(folder / "state.sqlite")) as file:
        file.execute("INSERT INTO series (name, followed) VALUES (?, 1)", (_GONE,))
        file.commit()
    return asyncio.run(_run(folder))


def test_pages(run: _Run) -> None:
    """The bodies, except for explanations for people."""
    lines = []
    for path, (status, kind, body) in run.pages.items():
        text = re.sub(r'^{"error":".*"}$', '{"error":"(text)"}', body.decode()) + "\n"
        if path != "metrics":
            lines.append(f"## GET /{path}: {status} {kind}\n{_broken(text)}")
    _check("pages.txt", "".join(lines))
    newest = [one for one in run.records if one.kind == "forecast" and one.key == _BTC.name][-1]
    assert run.pages[f"forecasts/{_BTC.name}"][2] == newest.value


def test_records_of_the_run(run: _Run) -> None:
    lines = [
        f"## {one.kind} of {one.key!r}, created {one.created}\n"
        f"{dict(one.headers)}\n{_broken(one.value.decode())}\n"
        for one in run.records
    ]
    _check("run-records.txt", "".join(lines))


def test_state_file_of_the_run(run: _Run) -> None:
    """Rows by the name of their series, whose number is not fixed; all records are delivered."""
    lines: list[str] = []
    with closing(sqlite3.connect(run.state_file)) as file:
        for table in ("series", "bars", "outcomes", "outbox"):
            cursor = file.execute(f"SELECT * FROM {table}")  # noqa: S608 - a table's name
            lines.append(f"{table} ({', '.join(one[0] for one in cursor.description)})\n")
            names = dict(file.execute("SELECT id, name FROM series"))
            lines += sorted(f"{names[number]}: {rest}\n" for number, *rest in cursor)
    _check("run-state.txt", "".join(lines))


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
    _check("run-metrics.txt", "".join(f"{name}\n" for name in sorted(names)))


def _broken(text: str) -> str:
    """JSON broken into lines where a member ends; nothing else is changed."""
    return text.replace(',"', ',\n"')


def _check(name: str, text: str) -> None:
    """Compare with the stored file, byte for byte."""
    path = _SNAPSHOTS / name
    if os.environ.get("KRONOS_UPDATE_SNAPSHOTS") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    stored = path.read_bytes().decode() if path.exists() else ""
    if text != stored:
        before, now = (part.splitlines(keepends=True) for part in (stored, text))
        difference = "".join(unified_diff(before, now, f"stored {name}", "now"))
        pytest.fail(f"{name} differs from what is stored:\n{difference}", pytrace=False)
