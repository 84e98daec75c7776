"""The daemon's memory: closed bars, outcomes and undelivered records in one SQLite file.

One process owns it, one thread talks to it, each call is one transaction. Write-ahead logging
without a sync per commit: a killed process loses nothing that was committed; after a power cut
the last moments may be missing, and the venues' histories bring the bars back.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import orjson
import structlog

from kronos_stream.daemon.due import Outcome
from kronos_stream.forecast.sink import Kind, Record
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.series import Series

_log = structlog.get_logger()
_T = TypeVar("_T")

SCHEMA_VERSION = 1
_APPLICATION_ID = 0x4B524F4E
"""KRON: marks the file as ours."""

_SCHEMA = """
CREATE TABLE series (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
                     origin INTEGER, revision INTEGER NOT NULL DEFAULT 0);
CREATE TABLE bars (series INTEGER NOT NULL, time INTEGER NOT NULL,
                   open REAL NOT NULL, high REAL NOT NULL, low REAL NOT NULL, close REAL NOT NULL,
                   volume REAL NOT NULL, amount REAL, revision INTEGER NOT NULL,
                   synthetic INTEGER NOT NULL, received INTEGER NOT NULL,
                   PRIMARY KEY (series, time)) WITHOUT ROWID;
CREATE TABLE outcomes (series INTEGER NOT NULL, origin INTEGER NOT NULL, revision INTEGER NOT NULL,
                       result TEXT NOT NULL, reason TEXT NOT NULL,
                       PRIMARY KEY (series, origin, revision)) WITHOUT ROWID;
CREATE TABLE outbox (sequence INTEGER PRIMARY KEY AUTOINCREMENT, sink TEXT NOT NULL,
                     kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL,
                     headers BLOB NOT NULL, created INTEGER NOT NULL);
CREATE INDEX outbox_by_sink ON outbox (sink, sequence);
"""

_BAR = "time, open, high, low, close, volume, amount, revision, synthetic, received"


class StateError(Exception):
    """The state file cannot be used; the message names the cause and the cure."""


class Draft(NamedTuple):
    """A record on its way into the outbox of one sink."""

    sink: str
    kind: Kind
    key: str
    value: bytes
    headers: tuple[tuple[str, bytes], ...]
    created: int
    """UTC ms."""


class State:
    """An open state file. Every call returns when its transaction is committed."""

    def __init__(self, path: Path, lock: int, thread: ThreadPoolExecutor) -> None:
        """:meth:`open` makes one."""
        self.path = path
        self._lock, self._thread = lock, thread
        self._ids: dict[str, int] = {}
        self._db: sqlite3.Connection

    @classmethod
    async def open(cls, path: Path) -> Self:
        """Open or make the file and lock it. Raises StateError."""
        thread = ThreadPoolExecutor(1, "state")
        try:
            lock = _locked(path)
            state = cls(path, lock, thread)
            await state._call(state._connect)
        except BaseException:
            thread.shutdown(wait=False)
            raise
        return state

    async def close(self) -> None:
        """Write everything into the one file and let it go."""
        await self._call(self._db.close)
        self._thread.shutdown()
        os.close(self._lock)

    async def load(self, series: Series, bars: int, until: int | None = None) -> list[Bar]:
        """The newest ``bars`` closed bars that open at ``until`` or before, oldest first."""
        query = (
            f"SELECT {_BAR} FROM bars "  # noqa: S608
            "WHERE series = (SELECT id FROM series WHERE name = ?) AND time <= ? "
            "ORDER BY time DESC LIMIT ?"
        )
        last = 2**62 if until is None else until
        rows = await self._call(
            lambda: self._db.execute(query, (series.name, last, bars)).fetchall()
        )
        return [_bar(row) for row in reversed(rows)]

    async def save_bars(self, rows: Sequence[tuple[Series, Bar]]) -> None:
        """Insert or replace."""

        def save() -> None:
            self._db.executemany(
                "INSERT OR REPLACE INTO bars VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (self._id(series.name), *bar.candle, bar.revision, bar.synthetic, bar.received)
                    for series, bar in rows
                ],
            )

        await self._write(save)

    async def begin(self, series: Series, origin: int) -> None:
        """Bars up to ``origin`` need no outcome; without effect if the series has a mark."""

        def begin() -> None:
            self._db.execute(
                "UPDATE series SET origin = ? WHERE id = ? AND origin IS NULL",
                (origin, self._id(series.name)),
            )

        await self._write(begin)

    async def mark(self, series: Series) -> tuple[int, int] | None:
        """Origin and revision of the newest bar with an outcome, or where the series began."""
        query = "SELECT origin, revision FROM series WHERE name = ? AND origin IS NOT NULL"
        row = await self._call(lambda: self._db.execute(query, (series.name,)).fetchone())
        return None if row is None else (row[0], row[1])

    async def record(
        self, outcomes: Sequence[Outcome], drafts: Sequence[Draft]
    ) -> list[tuple[str, Record]]:
        """Keep outcomes and put records into the outbox, all or none: (sink, record) each."""

        def record() -> list[tuple[str, Record]]:
            for one in outcomes:
                series = self._id(one.series)
                self._db.execute(
                    "INSERT OR IGNORE INTO outcomes VALUES (?, ?, ?, ?, ?)",
                    (series, one.origin, one.revision, one.result, one.reason),
                )
                self._db.execute(
                    "UPDATE series SET origin = ?1, revision = ?2 WHERE id = ?3 "
                    "AND (origin IS NULL OR (origin, revision) < (?1, ?2))",
                    (one.origin, one.revision, series),
                )
            return [(draft.sink, self._put(draft)) for draft in drafts]

        return await self._write(record)

    async def undelivered(self, sink: str, after: int, limit: int) -> list[Record]:
        """At most ``limit`` records of a sink with a sequence above ``after``, in order."""
        query = (
            "SELECT sequence, kind, key, value, headers, created FROM outbox "
            "WHERE sink = ? AND sequence > ? ORDER BY sequence LIMIT ?"
        )
        rows = await self._call(lambda: self._db.execute(query, (sink, after, limit)).fetchall())
        return [Record(*row[:4], _headers(row[4]), row[5]) for row in rows]

    async def delivered(self, sink: str, sequences: Sequence[int]) -> None:
        """Take records out of the outbox."""
        rows = [(sequence, sink) for sequence in sequences]
        statement = "DELETE FROM outbox WHERE sequence = ? AND sink = ?"
        await self._write(lambda: self._db.executemany(statement, rows))

    async def waiting(self) -> int:
        """Records that are undelivered, of all sinks."""
        query = "SELECT count(*) FROM outbox"
        row = await self._call(lambda: self._db.execute(query).fetchone())
        return int(row[0])

    async def outcomes(self, series: Series, since: int) -> list[Outcome]:
        """What became of the bars from ``since`` on, UTC ms of their opens."""
        query = (
            "SELECT name, outcomes.origin, outcomes.revision, result, reason FROM outcomes "
            "JOIN series ON series.id = outcomes.series "
            "WHERE name = ? AND outcomes.origin >= ? ORDER BY outcomes.origin, outcomes.revision"
        )
        rows = await self._call(lambda: self._db.execute(query, (series.name, since)).fetchall())
        return [Outcome(*row) for row in rows]

    async def prune(self, keep: int, outcomes_before: int) -> None:
        """Forget bars beyond each series' newest ``keep``, and outcomes of older origins.

        One transaction per series, so that nobody waits long. outcomes_before: UTC ms.
        """
        rows = await self._call(lambda: self._db.execute("SELECT id FROM series").fetchall())
        for (series,) in rows:
            await self._write(partial(self._prune_one, series, keep, outcomes_before))

    def _prune_one(self, series: int, keep: int, outcomes_before: int) -> None:
        self._db.execute(
            "DELETE FROM bars WHERE series = ?1 AND time < "
            "(SELECT time FROM bars WHERE series = ?1 ORDER BY time DESC LIMIT 1 OFFSET ?2)",
            (series, keep - 1),
        )
        self._db.execute(
            "DELETE FROM outcomes WHERE series = ? AND origin < ?", (series, outcomes_before)
        )

    def _put(self, draft: Draft) -> Record:
        headers = orjson.dumps([(name, value.decode()) for name, value in draft.headers])
        cursor = self._db.execute(
            "INSERT INTO outbox (sink, kind, key, value, headers, created) VALUES (?,?,?,?,?,?)",
            (*draft[:4], headers, draft.created),
        )
        assert cursor.lastrowid is not None  # noqa: S101 - of an insert
        _, kind, key, value, named, created = draft
        return Record(cursor.lastrowid, kind, key, value, named, created)

    def _id(self, name: str) -> int:
        known = self._ids.get(name)
        if known is None:
            self._db.execute("INSERT OR IGNORE INTO series (name) VALUES (?)", (name,))
            row = self._db.execute("SELECT id FROM series WHERE name = ?", (name,)).fetchone()
            known = self._ids[name] = int(row[0])
        return known

    def _connect(self) -> None:
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            owner = self._db.execute("PRAGMA application_id").fetchone()[0]
            tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if tables and owner != _APPLICATION_ID:
                raise StateError(f"{self.path}: a database, but none of ours; name another file")
            if version > SCHEMA_VERSION:
                raise StateError(
                    f"{self.path}: written by a newer version (schema {version}, ours is "
                    f"{SCHEMA_VERSION}); use that version, or another file"
                )
            if not tables:
                self._db.executescript(
                    f"BEGIN; {_SCHEMA} PRAGMA application_id = {_APPLICATION_ID}; "
                    f"PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
                )
        except sqlite3.Error as error:
            raise self._explained(error) from error

    async def _write(self, work: Callable[[], _T]) -> _T:
        def transaction() -> _T:
            known = dict(self._ids)
            self._db.execute("BEGIN IMMEDIATE")
            try:
                result = work()
                self._db.execute("COMMIT")
            except BaseException:
                self._ids = known
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            return result

        return await self._call(transaction)

    async def _call(self, work: Callable[[], _T]) -> _T:
        def guarded() -> _T:
            try:
                return work()
            except sqlite3.Error as error:
                raise self._explained(error) from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, guarded)

    def _explained(self, error: sqlite3.Error) -> StateError:
        if isinstance(error, sqlite3.DatabaseError) and "not a database" in str(error):
            return StateError(f"{self.path}: not a state file; name another or move it away")
        if "malformed" in str(error):
            return StateError(
                f"{self.path}: damaged ({error}); move it away: bars come back from the venues, "
                "records that were not delivered are lost"
            )
        return StateError(f"{self.path}: {error}")


def _locked(path: Path) -> int:
    """A descriptor that holds the lock beside ``path``; the kernel lets go when we end."""
    name = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateError(
            f"{name}: {error.strerror}; STATE_FILE must be in a writable folder"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.pread(lock, 20, 0).decode(errors="replace").strip()
        os.close(lock)
        raise StateError(
            f"{path}: in use by process {owner or 'unknown'}; stop it, or name another file"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


def _bar(row: tuple[Any, ...]) -> Bar:
    return Bar(Candle(*row[:7]), row[7], bool(row[8]), row[9])


def _headers(text: bytes) -> tuple[tuple[str, bytes], ...]:
    return tuple((name, value.encode()) for name, value in orjson.loads(text))
