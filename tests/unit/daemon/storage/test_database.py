"""The state file as a database: ownership, crashes, damage, schema versions, permissions."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from kronos_stream.daemon.storage.database import Database, StateError
from kronos_stream.daemon.storage.state import State
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.series import Series

A = Series.parse("v:A/X:1m")


def bar(minute: int) -> Bar:
    return Bar(Candle(60_000 * minute, 1.0, 2.0, 0.5, 1.0, 3.0))


@pytest.fixture
async def state(tmp_path: Path) -> AsyncIterator[State]:
    opened = await State.open(tmp_path / "deep" / "state.sqlite")
    yield opened
    await opened.close()


async def test_second_owner_is_refused_with_the_process_id_of_the_first(state: State) -> None:
    with pytest.raises(StateError, match=r"in use by process \d+; stop it"):
        await State.open(state.path)


async def test_failed_open_releases_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    path.write_text("Dear Sir or Madam, " * 1_000)
    for _ in range(2):
        with pytest.raises(StateError, match=r"state\.sqlite: not a state file"):
            await State.open(path)
    path.unlink()
    await (await State.open(path)).close()


_WRITER = """
import asyncio, sys
from pathlib import Path
from kronos_stream.daemon.requests import Outcome
from kronos_stream.daemon.storage.database import StateError
from kronos_stream.daemon.storage.state import State
from kronos_stream.interfaces.sink import Envelope
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.series import Series

async def main():
    state = await State.open(Path(sys.argv[1]))
    for i in range(1_000_000):
        candle = Candle(60_000 * i, 1.0, 2.0, 0.5, 1.0, 3.0)
        await state.save_bars([(Series.parse("v:A/X:1m"), Bar(candle))])
        envelope = Envelope("forecast", "v:A/X:1m", b"%d" % i + 6_000 * b".", ())
        outcomes = [Outcome("v:A/X:1m", 60_000 * i, 0, "forecast")]
        await state.record(outcomes, [envelope], sinks=["k"], created=i)
        print(i, flush=True)

try:
    asyncio.run(main())
except StateError as error:
    sys.exit(f"state error: {error}")
"""


@pytest.mark.parametrize("lines", [1, 20, 150, 700])
async def test_committed_data_survives_sigkill(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "state.sqlite"
    command = [sys.executable, "-c", _WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:  # noqa: ASYNC220, S603
        assert writer.stdout is not None
        for _ in range(lines):
            acknowledged = int(writer.stdout.readline())
        with pytest.raises(StateError, match=f"in use by process {writer.pid};"):
            await State.open(path)
        writer.kill()
        rest = writer.stdout.read().split(b"\n")[:-1]
    acknowledged = int(rest[-1]) if rest else acknowledged
    state = await State.open(path)
    saved = [one.candle.time // 60_000 for one in await state.load(A, 10**6)]
    outcomes = await state.outcomes(A, 0)
    records = await state.undelivered("k", 10**6)
    watermark = await state.watermark(A)
    await state.close()
    assert saved[: acknowledged + 1] == list(range(acknowledged + 1))
    assert len(saved) <= acknowledged + 2
    assert len(outcomes) in {acknowledged + 1, acknowledged + 2}
    assert [record.created for record in records] == list(range(len(outcomes)))
    assert watermark == (outcomes[-1].origin, 0)


async def test_full_disk_raises_state_error_and_loses_no_committed_data(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    shell = ["bash", "-c", 'ulimit -f 2000; exec "$0" "$@"']  # no file above 2 MB
    command = [*shell, sys.executable, "-c", _WRITER, str(path)]
    done = subprocess.run(  # noqa: ASYNC221, S603
        command, check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"state error: {path}: the disk ")
    acknowledged = int(done.stdout.splitlines()[-1])
    assert acknowledged > 20
    state = await State.open(path)
    assert len(await state.outcomes(A, 0)) == acknowledged + 1
    assert len(await state.undelivered("k", 10**6)) == acknowledged + 1
    await state.close()


async def test_event_loop_does_not_wait_for_a_locked_file(state: State) -> None:
    with closing(sqlite3.connect(state.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        saving = asyncio.create_task(state.save_bars([(A, bar(1))]))
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert not saving.done()
        other.execute("COMMIT")
        await saving
    assert len(await state.load(A, 9)) == 1


async def test_damaged_file_is_reported_with_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    state = await State.open(path)
    await state.save_bars([(A, bar(i)) for i in range(5_000)])
    await state.close()
    with path.open("r+b") as file:
        file.seek(8 * 4096)
        file.write(random.Random(1).randbytes(path.stat().st_size - 12 * 4096))
    state = await State.open(path)
    with pytest.raises(StateError, match=r"damaged; move it away .* bars are fetched again"):
        await state.load(A, 5_000)
    await state.close()


async def test_older_schema_is_upgraded(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    first = "CREATE TABLE a (x); INSERT INTO a VALUES (1)"
    await (await Database.open(path, [first])).close()
    with pytest.raises(StateError, match="no such table"):
        await Database.open(path, [first, "ALTER TABLE a ADD y", "DROP TABLE missing"])
    newer = await Database.open(path, [first, "ALTER TABLE a ADD y", "UPDATE a SET y = 2"])
    rows = await newer.read(lambda: newer.connection.execute("SELECT x, y FROM a").fetchall())
    await newer.close()
    assert rows == [(1, 2)]
    with pytest.raises(StateError, match=r"newer version \(schema 3, ours is 1\)"):
        await Database.open(path, [first])


async def test_cancelled_calls_leave_the_file_usable(state: State) -> None:
    calls = [asyncio.create_task(state.save_bars([(A, bar(i))])) for i in range(20)]
    await asyncio.sleep(0)
    for call in calls[10:]:
        call.cancel()
    await asyncio.wait(calls)
    assert {one.candle.time // 60_000 for one in await state.load(A, 99)} >= set(range(10))


async def test_database_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE theirs (x)")
    with pytest.raises(StateError, match="another program"):
        await State.open(path)


async def test_newer_schema_is_refused(state: State, tmp_path: Path) -> None:
    await state.save_bars([(A, bar(1))])
    newer = tmp_path / "newer.sqlite"
    with sqlite3.connect(state.path) as ours, sqlite3.connect(newer) as copy:
        ours.backup(copy)
        copy.execute("PRAGMA user_version = 99")
    with pytest.raises(StateError, match=r"newer version \(schema 99"):
        await State.open(newer)


async def test_missing_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="writable folder"):
        await State.open(tmp_path / "file" / "state.sqlite")


async def test_files_are_readable_by_the_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "state.sqlite"
    state = await State.open(path)
    await state.save_bars([(A, bar(1))])
    modes = {one.name: one.stat().st_mode & 0o777 for one in (path.parent, *path.parent.iterdir())}
    await state.close()
    assert modes.pop("folder") == 0o700
    assert len(modes) > 2
    assert set(modes.values()) == {0o600}
