"""Single checks of ``kronos-stream doctor``: clock, state file, disk, port, throughput."""

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


async def test_clock_sample_with_the_shortest_round_trip_counts() -> None:
    clock = ManualClock(1_000_000)
    round_trips = iter([400, 20, 3_000])

    async def fetch_time() -> int:
        clock.advance(clock.now() + next(round_trips))
        return clock.now() + 700

    level, found, remedy = await compare_clocks(fetch_time, clock, _SERIES)
    assert (level, found.partition(",")[0]) == (
        "warn", "our clock is 0.71 s behind the venue's (±11 ms)",
    )  # fmt: skip
    assert remedy


async def test_state_file_in_use_by_a_daemon_is_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    assert [one.level for one in await host_checks.check_state_file(path)] == ["ok"]
    assert not os.listdir(tmp_path)  # noqa: PTH208
    state = await State.open(path)
    disk, used = await host_checks.check_state_file(path)
    assert (disk.level, used.level) == ("ok", "ok")
    assert f"in use by process {os.getpid()}" in used.found
    await state.close()
    assert len(await host_checks.check_state_file(path)) == 1
    await (await State.open(path)).close()  # the check has released its lock


async def test_unusable_state_file_is_reported(tmp_path: Path) -> None:
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


def test_unwritable_folder_is_reported(tmp_path: Path) -> None:
    found = check_disk(Path("/proc/kronos/state.sqlite"), "KRONOS_STREAM_STATE_FILE")
    assert found.level == "fail"
    assert "cannot be written" in found.found
    assert "KRONOS_STREAM_STATE_FILE" in found.remedy
    (tmp_path / "file").touch()
    assert check_disk(tmp_path / "file" / "state.sqlite", "X").level == "fail"
    assert check_disk(tmp_path / "new" / "folder" / "state.sqlite", "X").level == "ok"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


async def test_port_is_free_or_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        (found,) = await host_checks.check_port(HttpSettings(port=number), tmp_path / "state")
        assert found.level == "fail"
        assert f"KRONOS_STREAM_HTTP__PORT={number}: another program" in found.found
    assert [
        one.level for one in await host_checks.check_port(HttpSettings(port=number), tmp_path / "s")
    ] == ["ok"]
    everywhere = HttpSettings(host="0.0.0.0", port=0)  # noqa: S104
    free, exposed = await host_checks.check_port(everywhere, tmp_path / "s")
    assert (free.level, exposed.level) == ("ok", "warn")
    assert "KRONOS_STREAM_HTTP__TOKEN" in exposed.remedy


@pytest.mark.parametrize(
    ("milliseconds", "series", "level", "text"),
    [
        (1.0, {"1m": 1_000}, "ok", "1000 series take 1 s when they close together, 1.7 % of"),
        (40.0, {"1m": 1_000}, "warn", "it keeps up, but not at every close"),
        (61.0, {"1m": 1_000}, "warn", "it cannot keep up"),
        (2.0, {"1s": 10, "1h": 1_000}, "warn", "it keeps up, but not at every close"),
        (5.0, {}, "warn", "no series is known"),
    ],
)
def test_throughput_is_compared_with_the_timeframes(
    milliseconds: float, series: dict[str, int], level: str, text: str
) -> None:
    followed = [
        Series.parse(f"x:S{i}:{timeframe}") for timeframe, n in series.items() for i in range(n)
    ]
    found = host_checks.check_throughput(milliseconds / 1_000, followed)
    assert found.level == level
    assert text in found.found


async def test_hanging_and_failing_checks_do_not_stop_the_others() -> None:
    async def hangs() -> Any:
        await asyncio.sleep(60)

    async def breaks() -> Any:
        raise ZeroDivisionError

    async def works() -> list[Finding]:
        return [Finding("ok", "fine")]

    checks = [Check("a", hangs, 0.05), Check("b", breaks), Check("c", works)]
    found = [(one.name, one.finding.level, one.finding.found) async for one in run_checks(checks)]
    assert found == [
        ("a", "fail", "no answer within 0.05 s"),
        ("b", "fail", "ZeroDivisionError"),
        ("c", "ok", "fine"),
    ]
