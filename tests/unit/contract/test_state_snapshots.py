"""Snapshots of the state file: its schema, and upgrades of older versions.

``tests/data/state`` holds dumps of files of older versions.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kronos_stream.daemon.storage.state import State
from tests.support.paths import DATA
from tests.support.snapshots import check_snapshot

_DUMPS = sorted((DATA / "state").glob("v*.sql"))


async def test_schema_of_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    await _open(path)
    check_snapshot("state-schema.txt", "".join(_schema(path)))


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
    check_snapshot(f"state-upgrade-{dump.stem}.txt", "".join((*_schema(path), *_rows(path))))
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
