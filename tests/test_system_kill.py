"""The daemon killed at any moment: every bar has its forecast on the topic all the same."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from kronos_stream.market.series import Series
from kronos_stream.testing.apache import ApacheKafka
from kronos_stream.testing.audit import audit, read_topic
from kronos_stream.testing.daemons import DaemonProcess, ExchangeProcess, wait_for

SYMBOLS = 5
SOAK_KILLS = int(os.environ.get("KRONOS_SOAK_KILLS", "200"))
SEED = int(os.environ.get("KRONOS_SEED", "0"))
BAR_MS = 1_000


@pytest.mark.parametrize(
    "kills",
    [
        5,
        pytest.param(
            SOAK_KILLS, marks=[pytest.mark.soak, pytest.mark.timeout(300 + 15 * SOAK_KILLS)]
        ),
    ],
)
def test_killed_at_any_moment_it_forecasts_every_bar(
    kills: int,
    kafka: ApacheKafka,
    topic_prefix: str,
    daemon_of: Callable[..., DaemonProcess],
) -> None:
    random = Random(SEED)
    exchange = ExchangeProcess("--symbols", str(SYMBOLS), "--history", "4000")
    with exchange, daemon_of(exchange, kafka.bootstrap, CATCH_UP="all") as daemon:
        first: dict[str, int] = {}
        for _ in range(kills):
            daemon.start()
            time.sleep(random.uniform(0.3, 8.0))  # it is ready after two to four seconds
            daemon.kill()
            wait_for("its worker has ended", lambda: not daemon.left_behind(), 5.0)
            first = _first_due(daemon.state_file) | first
        daemon.start()
        daemon.wait_until_ready()
        now = time.time_ns() // 1_000_000
        wait_for("all is caught up", lambda: _caught_up(daemon.state_file, now - BAR_MS), 120.0)
        first = _first_due(daemon.state_file) | first
        assert daemon.stop() == 0
        assert daemon.left_behind() == []
        assert len(first) == SYMBOLS
        due = {
            Series.parse(name): exchange.closed(Series.parse(name), opened, now - 2 * BAR_MS)
            for name, opened in first.items()
        }
        assert _query(daemon.state_file, "SELECT count(*) FROM outbox") == [(0,)]
        assert _query(daemon.state_file, "PRAGMA integrity_check") == [("ok",)]

    found = audit(read_topic(kafka.bootstrap, f"{topic_prefix}.forecasts.v1"), due)
    print(  # noqa: T201
        f"{kills} kills (seed {SEED}): {sum(map(len, due.values()))} bars due, {found.records} "
        f"records, {found.duplicates} of them twice"
    )
    assert found.faults == []
    assert found.records >= sum(map(len, due.values())) > 0


def _first_due(state: Path) -> dict[str, int]:
    """By series: open of the first bar that is to have an outcome, where that is known."""
    rows = _query(
        state,
        "SELECT name, series.origin, min(outcomes.origin) FROM series "
        "LEFT JOIN outcomes ON outcomes.series = series.id "
        "WHERE series.origin IS NOT NULL GROUP BY series.id",
    )
    return {name: begun + BAR_MS if first is None else first for name, begun, first in rows}


def _caught_up(state: Path, opened: int) -> bool:
    """Whether every series has an outcome for the newest bar closed when ``opened`` was open."""
    rows = _query(state, "SELECT count(*), min(origin) FROM series WHERE origin IS NOT NULL")
    number, oldest = rows[0]
    return number == SYMBOLS and oldest > opened - BAR_MS


def _query(path: Path, query: str) -> list[tuple[int, ...]]:
    """Read beside the daemon; nothing where it has not come so far as to make the file."""
    if not path.exists():
        return []
    with closing(sqlite3.connect(path, timeout=10)) as state:
        try:
            return state.execute(query).fetchall()
        except sqlite3.OperationalError:
            return []
