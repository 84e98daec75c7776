"""An SQLite file with one owner: locked, of a known schema, used by one thread of its own.

Write-ahead logging without a sync per commit: a killed process loses nothing that was committed,
a power cut may take the last moments, but never half a transaction.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Self, TypeVar

import structlog

_log = structlog.get_logger()
_T = TypeVar("_T")

APPLICATION_ID = 0x4B524F4E
"""KRON: marks the file as ours."""
_BUSY_TIMEOUT_SECONDS = 10.0
"""How long somebody else, with a shell on the file, may hold it up."""
_CACHE_KB = 32_768
"""With SQLite's own 2 MB, a batch of forecasts takes twice as long."""

_IN_MEMORY = Path(":memory:")
"""SQLite's name of a database without a file."""

_REMEDIES = {
    sqlite3.SQLITE_NOTADB: "not a state file; name another file, or move this one away",
    sqlite3.SQLITE_CORRUPT: (
        "damaged; move it away with its -wal file and start again: bars come back from the venues, "
        "messages that were not delivered are lost"
    ),
    sqlite3.SQLITE_FULL: "the disk is full; make room and start again, nothing recorded is lost",
    sqlite3.SQLITE_IOERR: (
        "the disk cannot be read or written; see to it and start again, nothing recorded is lost"
    ),
    sqlite3.SQLITE_READONLY: "cannot be written; see to its permissions, or name another file",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; see to its permissions, or name another file",
    sqlite3.SQLITE_BUSY: "held by another program; close it and start again",
}


class StateError(Exception):
    """The state file cannot be used; the message names the cause and the cure."""


class Database:
    """An open file. Calls queue for its thread, so that the event loop never waits for a disk."""

    connection: sqlite3.Connection
    """For the functions given to :meth:`read` and :meth:`write` alone."""

    def __init__(self, path: Path, lock: int | None) -> None:
        """:meth:`open` makes one."""
        self.path = path
        self.on_rollback: Callable[[], None] = _noop
        """Called in the thread when a transaction did not happen, to drop what was made of it."""
        self._lock = lock
        self._executor = ThreadPoolExecutor(1, "state")

    @classmethod
    async def open(cls, path: Path | None, schema: Sequence[str]) -> Self:
        """Open or make the file, its folder too, and lock it. Raises StateError.

        path: None for a database in memory.

        schema: one script per version, each leading from the version before; never changed later.
        """
        loop = asyncio.get_running_loop()
        lock = None if path is None else await loop.run_in_executor(None, _acquire_lock, path)
        database = cls(path or _IN_MEMORY, lock)
        try:
            await database.read(lambda: database._connect(schema))
        except BaseException:
            database._release()
            raise
        return database

    async def close(self) -> None:
        """Fold the log into the file and let go of it."""
        try:
            await self.read(self.connection.close)
        finally:
            self._release()

    async def read(self, work: Callable[[], _T]) -> _T:
        """What ``work`` gives, in the database's thread. Raises StateError."""

        def explained() -> _T:
            try:
                return work()
            except sqlite3.Error as error:
                raise self._to_state_error(error) from error

        return await asyncio.get_running_loop().run_in_executor(self._executor, explained)

    async def write(self, work: Callable[[], _T]) -> _T:
        """As :meth:`read`, in one transaction: all of it has happened on return, or none.

        A caller that is cancelled does not know which.
        """

        def transaction() -> _T:
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                result = work()
                self.connection.execute("COMMIT")
            except BaseException:
                self.on_rollback()
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise
            return result

        return await self.read(transaction)

    def _release(self) -> None:
        self._executor.shutdown(wait=False)
        if self._lock is not None:
            os.close(self._lock)

    def _connect(self, schema: Sequence[str]) -> None:
        self.connection = sqlite3.connect(
            self.path, isolation_level=None, timeout=_BUSY_TIMEOUT_SECONDS
        )
        try:
            self._check_version(newest=len(schema))
            self._set_pragmas()
            self._migrate(schema)
        except BaseException:
            self.connection.close()
            raise

    def _check_version(self, newest: int) -> None:
        version = self._scalar("PRAGMA user_version")
        tables = self._scalar("SELECT count(*) FROM sqlite_master")
        if tables and self._scalar("PRAGMA application_id") != APPLICATION_ID:
            raise StateError(f"{self.path}: a database, but none of ours; name another file")
        if version > newest:
            raise StateError(
                f"{self.path}: written by a newer version (schema {version}, ours is {newest}); "
                "use that version, or another file"
            )

    def _set_pragmas(self) -> None:
        self.connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # heeded by a new file alone
        mode = self.connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if self.path != _IN_MEMORY and mode != ("wal",):
            raise StateError(f"{self.path}: not on a local disk; name a file on one")
        self.connection.execute("PRAGMA synchronous = NORMAL")
        self.connection.execute(f"PRAGMA cache_size = -{_CACHE_KB}")

    def _migrate(self, schema: Sequence[str]) -> None:
        had = self._scalar("PRAGMA user_version")
        for version, script in enumerate(schema[had:], had + 1):
            if had:
                _log.info("state file brought up to date", path=str(self.path), schema=version)
            self.connection.executescript(
                f"BEGIN; {script}; PRAGMA application_id = {APPLICATION_ID}; "
                f"PRAGMA user_version = {version}; COMMIT;"
            )

    def _scalar(self, query: str) -> int:
        number: int = self.connection.execute(query).fetchone()[0]
        return number

    def _to_state_error(self, error: sqlite3.Error) -> StateError:
        code = getattr(error, "sqlite_errorcode", None)
        cure = None if code is None else _REMEDIES.get(code & 0xFF)
        return StateError(f"{self.path}: {f'{cure} ({error})' if cure else error}")


def _noop() -> None:
    pass


def lock_path(path: Path) -> Path:
    """The file that whoever has ``path`` open holds locked; its process number is in there."""
    return path.with_name(path.name + ".lock")


def _acquire_lock(path: Path) -> int:
    """A descriptor that holds the lock beside ``path``; the kernel lets go when we end."""
    name = lock_path(path)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
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
    with suppress(OSError):  # SQLite says it better
        # What it makes beside it has the same rights.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock
