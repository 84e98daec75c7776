"""The daemon killed at random times: every bar still gets its forecast."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from kronos_stream.forecast.message import Forecast
from kronos_stream.market.series import Series
from tests.support.apache_kafka import ApacheKafka
from tests.support.daemon_process import DaemonProcess
from tests.support.exchange_process import ExchangeProcess
from tests.support.forecast_audit import audit_forecasts, read_topic
from tests.support.processes import wait_for

SYMBOLS = 5
SOAK_KILLS = int(os.environ.get("KRONOS_SOAK_KILLS", "200"))
SEED = int(os.environ.get("KRONOS_SEED", "0"))


@pytest.mark.parametrize(
    "kills",
    [
        5,
        pytest.param(
            SOAK_KILLS, marks=[pytest.mark.soak, pytest.mark.timeout(300 + 15 * SOAK_KILLS)]
        ),
    ],
)
def test_every_bar_is_forecast_in_spite_of_kills(
    kills: int,
    kafka: ApacheKafka,
    topic_prefix: str,
    make_daemon: Callable[..., DaemonProcess],
) -> None:
    random = Random(SEED)
    exchange = ExchangeProcess("--symbols", str(SYMBOLS), "--history", "4000")
    with exchange, make_daemon(exchange, kafka.bootstrap, CATCH_UP="all") as daemon:
        first: dict[Series, int] = {}
        for _ in range(kills):
            daemon.start()
            if random.random() < 0.6:  # otherwise during its start
                daemon.wait_until_ready()
            time.sleep(random.uniform(0.0, 4.0))
            daemon.kill()
            # Immediately, unless it is just importing torch.
            wait_for("its worker has ended", lambda: not daemon.leftover_processes())
            for series, (opened, _newest) in daemon.outcome_range(exchange.series()).items():
                first.setdefault(series, opened)
        daemon.start()
        daemon.wait_until_ready()
        now = time.time_ns() // 1_000_000
        topic = f"{topic_prefix}.forecasts.v1"
        wait_for("all catch up", lambda: _oldest(kafka, topic) >= now, interval=1.0)
        assert daemon.stop() == 0
        assert daemon.leftover_processes() == []
        assert daemon.undelivered() == 0
        decided = daemon.outcome_range(exchange.series())
        due = {
            series: exchange.closed_bar_times(series, first.get(series, opened), newest)
            for series, (opened, newest) in decided.items()
        }
        assert _is_whole(daemon.state_file)
    assert len(due) == SYMBOLS

    found = audit_forecasts(read_topic(kafka.bootstrap, topic), due)
    print(  # noqa: T201
        f"{kills} kills (seed {SEED}): {sum(map(len, due.values()))} bars due, {found.records} "
        f"records, {found.duplicates} of them twice"
    )
    assert found.problems == []
    assert found.records >= sum(map(len, due.values())) > 0


def _oldest(kafka: ApacheKafka, topic: str) -> float:
    """Close time (UTC ms) of the newest bar of the series that is furthest behind."""
    newest = dict(read_topic(kafka.bootstrap, topic))
    if len(newest) < SYMBOLS:
        return 0.0
    return 1000 * min(Forecast.parse(v).times[0].timestamp() for v in newest.values())


def _is_whole(path: Path) -> bool:
    with closing(sqlite3.connect(path)) as state:
        return state.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
