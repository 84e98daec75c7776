"""The state file: what was acknowledged is there, whoever was killed; one owner at a time."""

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

from kronos_stream.daemon.requests import Outcome
from kronos_stream.daemon.storage.database import Database, StateError
from kronos_stream.daemon.storage.state import Backlog, State
from kronos_stream.interfaces.sink import Envelope, Record
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.series import Series

A, B = Series.parse("v:A/X:1m"), Series.parse("v:B/X:1m")


def bar(minute: int, close: float = 1.0, amount: float | None = 2.5, **more: int) -> Bar:
    return Bar(Candle(60_000 * minute, 1.0, 2.0, 0.5, close, 3.0, amount), **more)  # type: ignore[arg-type]


def outcome(series: Series, minute: int, revision: int = 0) -> Outcome:
    return Outcome(series.name, 60_000 * minute, revision, "forecast")


def envelope(number: int) -> Envelope:
    return Envelope("forecast", A.name, b"%d" % number, (("ce_id", b"x"),))


_INVALID = envelope(3)._replace(value=None)  # type: ignore[arg-type]
"""An envelope that SQLite rejects."""


async def put(state: State, sink: str, *numbers: int) -> list[Record]:
    """Put an envelope for each number into the outbox of ``sink``; created 1000 ms later each."""
    records = []
    for number in numbers:
        created = 1_000 + number
        records += await state.record([], [envelope(number)], sinks=[sink], created=created)
    return [record for _, record in records]


@pytest.fixture
async def state(tmp_path: Path) -> AsyncIterator[State]:
    opened = await State.open(tmp_path / "deep" / "state.sqlite")
    yield opened
    await opened.close()


async def test_bars_come_back_as_they_were(state: State) -> None:
    bars = [bar(1), bar(2, amount=None), bar(3, revision=4, synthetic=True, received=99)]
    await state.save_bars([(A, one) for one in bars] + [(B, bar(9))])
    assert await state.load(A, 10) == bars
    assert await state.load(A, 2) == bars[1:]
    assert await state.load(A, 2, until=120_000) == bars[:2]
    assert await state.load(Series.parse("v:C/X:1m"), 5) == []


async def test_a_revised_bar_replaces_the_old_one(state: State) -> None:
    await state.save_bars([(A, bar(1))])
    await state.save_bars([(A, bar(1, close=1.5, revision=1))])
    assert await state.load(A, 5) == [bar(1, close=1.5, revision=1)]


async def test_the_mark_begins_once_and_only_goes_on(state: State) -> None:
    assert await state.watermark(A) is None
    await state.init_watermark(A, 60_000)
    await state.init_watermark(A, 600_000)
    assert await state.watermark(A) == (60_000, 0)
    await state.record([outcome(A, 3), outcome(A, 3, 1)], [])
    await state.record([outcome(A, 2)], [])
    assert await state.watermark(A) == (180_000, 1)
    assert await state.watermark(B) is None


async def test_a_bar_has_one_outcome_only(state: State) -> None:
    await state.record([outcome(A, 1)], [])
    await state.record([outcome(A, 1)._replace(result="skipped", reason="gap")], [])
    assert await state.outcomes(A, 0) == [outcome(A, 1)]
    assert await state.outcomes(A, 60_001) == []


async def test_records_wait_per_sink_in_order_until_delivered(state: State) -> None:
    both = await state.record([], [envelope(1)], sinks=["k", "m"], created=1_001)
    assert [(sink, record.value) for sink, record in both] == [("k", b"1"), ("m", b"1")]
    ours = [both[0][1], *await put(state, "k", 3)]
    assert await state.undelivered("k", 10) == ours
    assert await state.undelivered("k", 1) == ours[:1]
    assert await state.undelivered("k", 10, size=1) == ours[:1]
    assert await state.backlogs() == {"k": Backlog(2, 1_001), "m": Backlog(1, 1_001)}
    assert await state.mark_delivered("k", ours[0].sequence) == []
    assert await state.undelivered("k", 10) == ours[1:]
    assert await state.backlogs() == {"k": Backlog(1, 1_003), "m": Backlog(1, 1_001)}


async def test_a_delivery_and_its_dead_letters_are_one_transaction(state: State) -> None:
    [first] = await put(state, "k", 1)
    with pytest.raises(StateError):
        await state.mark_delivered("k", first.sequence, [envelope(2), _INVALID])
    assert await state.undelivered("k", 10) == [first]
    [letter] = await state.mark_delivered("k", first.sequence, [envelope(2)], created=1_002)
    assert letter[1:] == (*envelope(2), 1_002)
    assert await state.undelivered("k", 10) == [letter]


async def test_old_records_expire_from_the_front_in_small_steps(state: State) -> None:
    records = await put(state, "k", 1, 2, 3, 9, 4)
    await put(state, "m", 1)
    assert await state.expire("k", 1_005, limit=2) == (2, records[1].sequence)
    assert await state.expire("k", 1_005, limit=2) == (1, records[2].sequence)
    assert await state.expire("k", 1_005, limit=2) == (0, 0)  # what follows a newer one stays
    assert await state.undelivered("k", 10) == records[3:]
    assert len(await state.undelivered("m", 10)) == 1


async def test_numbers_are_never_given_twice(state: State) -> None:
    [first] = await put(state, "k", 1)
    await state.mark_delivered("k", first.sequence)
    [second] = await put(state, "k", 2)
    assert second.sequence > first.sequence


async def test_a_transaction_is_kept_whole_or_not_at_all(state: State) -> None:
    with pytest.raises(StateError):
        await state.record([outcome(B, 1)], [envelope(1), _INVALID], sinks=["k"])
    assert await state.outcomes(B, 0) == []
    assert await state.backlogs() == {}
    await state.save_bars([(A, bar(1))])
    await state.record([outcome(B, 1)], [])  # nor is the number of B's name remembered wrongly
    assert await state.outcomes(B, 0) == [outcome(B, 1)]
    assert await state.load(B, 9) == []


async def test_pruning_keeps_the_newest(state: State) -> None:
    await state.save_bars([(A, bar(i)) for i in range(10)] + [(B, bar(1))])
    await state.record([outcome(A, i) for i in range(10)], [])
    await state.prune(3, 8 * 60_000)
    assert [one.candle.time for one in await state.load(A, 99)] == [420_000, 480_000, 540_000]
    assert len(await state.load(B, 99)) == 1
    assert await state.outcomes(A, 0) == [outcome(A, 8), outcome(A, 9)]
    assert await state.watermark(A) == (540_000, 0)


async def test_what_an_outage_took_goes_back_to_the_disk(tmp_path: Path) -> None:
    state = await State.open(tmp_path / "state.sqlite")
    big = envelope(1)._replace(value=bytes(100_000))
    for _ in range(30):
        records = await state.record([], [big] * 10, sinks=["k"])
    await state.mark_delivered("k", records[-1][1].sequence)
    await state.prune(1, 0)
    await state.close()
    assert state.path.stat().st_size < 20_000_000


async def test_pruning_goes_in_steps(state: State) -> None:
    await state.save_bars([(A, bar(i)) for i in range(10_001)])
    await state.record([outcome(A, i) for i in (*range(5_000), 10_000)], [])
    pruning = asyncio.create_task(state.prune(10, 4_999 * 60_000))
    await asyncio.sleep(0)
    assert await state.watermark(A) == (10_000 * 60_000, 0)
    assert not pruning.done()  # it let others in between
    await pruning
    assert len(await state.load(A, 99)) == 10
    assert await state.outcomes(A, 0) == [outcome(A, 4_999), outcome(A, 10_000)]


async def test_a_second_owner_is_refused_and_told_who_has_it(state: State) -> None:
    with pytest.raises(StateError, match=r"in use by process \d+; stop it"):
        await State.open(state.path)


async def test_a_failed_start_lets_go_of_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    path.write_text("Dear Sir or Madam, " * 1_000)
    for _ in range(2):
        with pytest.raises(StateError, match=r"state\.sqlite: not a state file"):
            await State.open(path)
    path.unlink()
    await (await State.open(path)).close()


_VICTIM = """
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
async def test_what_was_acknowledged_survives_kill_9(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "state.sqlite"
    command = [sys.executable, "-c", _VICTIM, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as victim:  # noqa: ASYNC220, S603
        assert victim.stdout is not None
        for _ in range(lines):
            acknowledged = int(victim.stdout.readline())
        with pytest.raises(StateError, match=f"in use by process {victim.pid};"):
            await State.open(path)
        victim.kill()
        rest = victim.stdout.read().split(b"\n")[:-1]
    acknowledged = int(rest[-1]) if rest else acknowledged
    state = await State.open(path)
    saved = [one.candle.time // 60_000 for one in await state.load(A, 10**6)]
    outcomes = await state.outcomes(A, 0)
    records = await state.undelivered("k", 10**6)
    mark = await state.watermark(A)
    await state.close()
    assert saved[: acknowledged + 1] == list(range(acknowledged + 1))
    assert len(saved) <= acknowledged + 2
    assert len(outcomes) in {acknowledged + 1, acknowledged + 2}
    assert [record.created for record in records] == list(range(len(outcomes)))
    assert mark == (outcomes[-1].origin, 0)


async def test_a_full_disk_ends_the_daemon_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    shell = ["bash", "-c", 'ulimit -f 2000; exec "$0" "$@"']  # no file above 2 MB
    command = [*shell, sys.executable, "-c", _VICTIM, str(path)]
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


async def test_the_event_loop_does_not_wait_for_the_file(state: State) -> None:
    with closing(sqlite3.connect(state.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        saving = asyncio.create_task(state.save_bars([(A, bar(1))]))
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert not saving.done()
        other.execute("COMMIT")
        await saving
    assert len(await state.load(A, 9)) == 1


async def test_a_damaged_file_is_told_with_the_cure(tmp_path: Path) -> None:
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


async def test_an_older_file_is_brought_up_to_date(tmp_path: Path) -> None:
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


async def test_a_cancelled_call_is_done_or_not_and_the_file_goes_on(state: State) -> None:
    calls = [asyncio.create_task(state.save_bars([(A, bar(i))])) for i in range(20)]
    await asyncio.sleep(0)
    for call in calls[10:]:
        call.cancel()
    await asyncio.wait(calls)
    assert {one.candle.time // 60_000 for one in await state.load(A, 99)} >= set(range(10))


async def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE theirs (x)")
    with pytest.raises(StateError, match="another program"):
        await State.open(path)


async def test_a_newer_schema_is_refused(state: State, tmp_path: Path) -> None:
    await state.save_bars([(A, bar(1))])
    newer = tmp_path / "newer.sqlite"
    with sqlite3.connect(state.path) as ours, sqlite3.connect(newer) as copy:
        ours.backup(copy)
        copy.execute("PRAGMA user_version = 99")
    with pytest.raises(StateError, match=r"newer version \(schema 99"):
        await State.open(newer)


async def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="writable folder"):
        await State.open(tmp_path / "file" / "state.sqlite")


async def test_pruning_spares_bars_without_an_outcome_and_their_contexts(state: State) -> None:
    await state.save_bars([(A, bar(i)) for i in range(10)])
    await state.init_watermark(A, 4 * 60_000)
    await state.prune(3, 0)
    assert [one.candle.time // 60_000 for one in await state.load(A, 99)] == list(range(2, 10))


async def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "of ours" / "state.sqlite"
    state = await State.open(path)
    await state.save_bars([(A, bar(1))])
    modes = {one.name: one.stat().st_mode & 0o777 for one in (path.parent, *path.parent.iterdir())}
    await state.close()
    assert modes.pop("of ours") == 0o700
    assert len(modes) > 2
    assert set(modes.values()) == {0o600}
