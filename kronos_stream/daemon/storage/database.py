"""SQLite file with one owner: locked, of a known schema, used by a thread of its own.

It uses write-ahead logging without a sync per commit: a killed process loses no committed data; a
power cut may lose the last transactions, but never parts of one.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Self, TypeVar

import structlog

_log = structlog.get_logger()
_T = TypeVar("_T")

APPLICATION_ID = 0x4B524F4E
"""KRON in ASCII: marks the file as ours."""
_MAGIC = b"SQLite format 3\0"
_HEADER = struct.Struct(">60xI4xI")
"""Part of SQLite's file header: user_version and application_id."""
_BUSY_TIMEOUT_SECONDS = 10.0
"""Limit for locks of other programs, such as an SQLite shell."""
_CACHE_KB = 32_768
"""With SQLite's default of 2 MB, saving a batch of forecasts takes twice as long."""

_IN_MEMORY = Path(":memory:")
"""SQLite's name of a database without a file."""

_REMEDIES = {
    sqlite3.SQLITE_NOTADB: "not a state file; name another file, or move this one away",
    sqlite3.SQLITE_CORRUPT: (
        "damaged; move it away with its -wal file and start again: bars are fetched again, "
        "undelivered messages are lost"
    ),
    sqlite3.SQLITE_FULL: "the disk is full; free space and start again, nothing recorded is lost",
    sqlite3.SQLITE_IOERR: (
        "the disk cannot be read or written; check it and start again, nothing recorded is lost"
    ),
    sqlite3.SQLITE_READONLY: "cannot be written; check its permissions, or name another file",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; check its permissions, or name another file",
    sqlite3.SQLITE_BUSY: "locked by another program; close that and start again",
}


class StateError(Exception):
    """The state file cannot be used; the message names cause and remedy."""


class Database:
    """An open file, created by :meth:`open`. Calls run in its thread, not in the event loop."""

    connection: sqlite3.Connection
    """Only for functions that are passed to :meth:`read` and :meth:`write`."""

    def __init__(self, path: Path, lock: int | None) -> None:
        self.path = path
        self.on_rollback: Callable[[], None] = lambda: None
        """Called in the thread after a rollback, to discard values derived from it."""
        self._lock = lock
        self._executor = ThreadPoolExecutor(1, "state")

    @classmethod
    async def open(cls, path: Path | None, schema: Sequence[str]) -> Self:
        """Open or create the file and its folder, and lock it. Raises StateError.

        path: None for a database in memory. schema: one script per version, each upgrading from
        the version before.
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
        """Merge the write-ahead log into the file, close it and release the lock."""
        try:
            await self.read(self.connection.close)
        finally:
            self._release()

    async def read(self, work: Callable[[], _T]) -> _T:
        """Return the result of ``work``, called in the database's thread. Raises StateError."""

        def call() -> _T:
            try:
                return work()
            except sqlite3.Error as error:
                raise self._to_state_error(error) from error

        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    async def write(self, work: Callable[[], _T]) -> _T:
        """Call ``work`` in one transaction, committed on return. Raises StateError.

        If the caller is cancelled, the transaction may or may not be committed.
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
            raise StateError(f"{self.path}: a database of another program; name another file")
        if version > newest:
            raise StateError(
                f"{self.path}: written by a newer version (schema {version}, ours is {newest}); "
                "use that version, or another file"
            )

    def _set_pragmas(self) -> None:
        self.connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # applies to new files only
        mode = self.connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if self.path != _IN_MEMORY and mode != ("wal",):
            raise StateError(f"{self.path}: not on a local disk; name a file on one")
        self.connection.execute("PRAGMA synchronous = NORMAL")
        self.connection.execute(f"PRAGMA cache_size = -{_CACHE_KB}")

    def _migrate(self, schema: Sequence[str]) -> None:
        current = self._scalar("PRAGMA user_version")
        for version, script in enumerate(schema[current:], current + 1):
            if current:
                _log.info("state file upgraded", path=str(self.path), schema=version)
            self.connection.executescript(
                f"BEGIN; {script}; PRAGMA application_id = {APPLICATION_ID}; "
                f"PRAGMA user_version = {version}; COMMIT;"
            )

    def _scalar(self, query: str) -> int:
        number: int = self.connection.execute(query).fetchone()[0]
        return number

    def _to_state_error(self, error: sqlite3.Error) -> StateError:
        code = getattr(error, "sqlite_errorcode", None)
        remedy = None if code is None else _REMEDIES.get(code & 0xFF)
        return StateError(f"{self.path}: {f'{remedy} ({error})' if remedy else error}")


def lock_path(path: Path) -> Path:
    """Path of the lock file; it contains the process id of the owner."""
    return path.with_name(path.name + ".lock")


def lock_owner(path: Path) -> str | None:
    """Process id of the daemon that uses the state file; None if it is not in use."""
    try:
        lock = os.open(lock_path(path), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # Shared and released at once, so that it hardly ever disturbs a daemon that starts.
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return os.pread(lock, 20, 0).decode(errors="replace").strip() or "unknown"
    finally:
        os.close(lock)
    return None


def incompatibility(path: Path, newest: int) -> str:
    """Reason why the file is no usable state file, by its header alone; empty if there is none.

    newest: the latest known version of the schema.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
    except OSError:  # reported by the check of the disk
        return ""
    if not head:
        return ""
    if not head.startswith(_MAGIC) or len(head) < _HEADER.size:
        return "not a state file"
    version, application = _HEADER.unpack(head)
    if application != APPLICATION_ID:
        return "a database of another program" if version or application else ""
    if version > newest:
        return f"written by a newer version (schema {version}, ours is {newest})"
    return ""


def _acquire_lock(path: Path) -> int:
    """Lock the state file and return the descriptor; the kernel releases it when we exit."""
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
    with suppress(OSError):  # SQLite reports it with the cause
        # SQLite's other files get the permissions of this one.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock
