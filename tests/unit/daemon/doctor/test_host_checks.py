"""Single checks of ``kronos-stream doctor``: the clock, the state file, the disk, port and pace."""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kronos_stream.daemon.config.settings import HttpSettings
from kronos_stream.daemon.doctor import host_checks
from kronos_stream.daemon.storage.schema import SCHEMA_VERSION
from kronos_stream.daemon.storage.state import State
from kronos_stream.interfaces.diagnostics import Check, Finding, run_checks
from kronos_stream.interfaces.probes import check_disk, compare_clocks
from kronos_stream.market.clock import ManualClock
from kronos_stream.market.series import Series

_SERIES = [Series.parse("binance:BTC/USDT:1m")]


async def test_the_quickest_answer_tells_the_time_best() -> None:
    clock = ManualClock(1_000_000)
    trips = iter([400, 20, 3_000])

    async def ask() -> int:
        clock.advance(clock.now() + next(trips))
        return clock.now() + 700

    level, found, cure = await compare_clocks(ask, clock, _SERIES)
    assert (level, found.partition(",")[0]) == (
        "warn", "our clock is 0.71 s behind the venue's (±11 ms)",
    )  # fmt: skip
    assert cure


async def test_a_state_file_in_use_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    assert [one.level for one in await host_checks.check_state_file(path)] == ["ok"]
    assert not os.listdir(tmp_path)  # noqa: PTH208
    state = await State.open(path)
    disk, used = await host_checks.check_state_file(path)
    assert (disk.level, used.level) == ("ok", "ok")
    assert f"in use by process {os.getpid()}" in used.found
    await state.close()
    assert len(await host_checks.check_state_file(path)) == 1
    await (await State.open(path)).close()  # no lock of ours stays behind


async def test_a_state_file_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    await (await State.open(path)).close()
    with closing(sqlite3.connect(path)) as sql:
        sql.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    _, newer = await host_checks.check_state_file(path)
    assert newer.level == "fail"
    assert f"newer version (schema {SCHEMA_VERSION + 1}, ours is {SCHEMA_VERSION})" in newer.found
    for content in (b"# Notes\n", os.urandom(4_096)):
        path.write_bytes(content)
        assert (await host_checks.check_state_file(path))[1].found.endswith("not a state file")
    path.unlink()
    with closing(sqlite3.connect(path)) as sql:
        sql.execute("PRAGMA user_version = 1")
    assert (await host_checks.check_state_file(path))[1].found.endswith(
        "a database of another program"
    )


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    found = check_disk(Path("/proc/kronos/state.sqlite"), "KRONOS_STREAM_STATE_FILE")
    assert found.level == "fail"
    assert "cannot be written" in found.found
    assert "KRONOS_STREAM_STATE_FILE" in found.remedy
    (tmp_path / "file").touch()
    assert check_disk(tmp_path / "file" / "state.sqlite", "X").level == "fail"
    assert check_disk(tmp_path / "new" / "folder" / "state.sqlite", "X").level == "ok"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


async def test_a_port_is_free_taken_or_ours(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        (found,) = await host_checks.check_port(HttpSettings(port=number), tmp_path / "state")
        assert found.level == "fail"
        assert f"KRONOS_STREAM_HTTP__PORT={number}: another program" in found.found
    assert [
        one.level for one in await host_checks.check_port(HttpSettings(port=number), tmp_path / "s")
    ] == ["ok"]
    free, seen = await host_checks.check_port(HttpSettings(host="0.0.0.0", port=0), tmp_path / "s")  # noqa: S104
    assert (free.level, seen.level) == ("ok", "warn")
    assert "KRONOS_STREAM_HTTP__TOKEN" in seen.remedy


@pytest.mark.parametrize(
    ("milliseconds", "series", "level", "said"),
    [
        (1.0, {"1m": 1_000}, "ok", "1000 series take 1 s when they close together, 1.7 % of"),
        (40.0, {"1m": 1_000}, "warn", "it keeps up, but not at every close"),
        (61.0, {"1m": 1_000}, "warn", "it cannot keep up"),
        (2.0, {"1s": 10, "1h": 1_000}, "warn", "it keeps up, but not at every close"),
        (5.0, {}, "warn", "no series is known"),
    ],
)
def test_the_pace_is_what_the_timeframes_allow(
    milliseconds: float, series: dict[str, int], level: str, said: str
) -> None:
    wanted = [
        Series.parse(f"x:S{i}:{timeframe}") for timeframe, n in series.items() for i in range(n)
    ]
    found = host_checks.check_throughput(milliseconds / 1_000, wanted)
    assert found.level == level
    assert said in found.found


async def test_a_check_that_hangs_or_breaks_holds_up_no_other() -> None:
    async def hangs() -> Any:
        await asyncio.sleep(60)

    async def breaks() -> Any:
        raise ZeroDivisionError

    async def works() -> list[Finding]:
        return [Finding("ok", "fine")]

    looks = [Check("a", hangs, 0.05), Check("b", breaks), Check("c", works)]
    found = [(one.name, one.finding.level, one.finding.found) async for one in run_checks(looks)]
    assert found == [
        ("a", "fail", "no answer within 0.05 s"),
        ("b", "fail", "ZeroDivisionError"),
        ("c", "ok", "fine"),
    ]
