"""Upgrades of state files of older versions.

``data/state/v1.sql`` and so on are dumps of files written by the version with that schema.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import orjson
import pytest

from kronos_stream.daemon.storage.schema import SCHEMA_VERSION
from kronos_stream.daemon.storage.state import State
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.series import Series
from tests.support.daemon_process import DaemonProcess
from tests.support.exchange_process import ExchangeProcess
from tests.support.paths import DATA
from tests.support.processes import wait_for

DUMPS = sorted((DATA / "state").glob("v*.sql"))
BTC, ETH = (Series.parse(f"binance:{base}/USDT:1m") for base in ("BTC", "ETH"))
FIRST, MINUTE = 1_750_000_020_000, 60_000


def _restore_dump(dump: Path, path: Path) -> Path:
    with closing(sqlite3.connect(path)) as file:
        file.executescript(dump.read_text(encoding="utf-8"))
    return path


def _bar(number: int) -> Bar:
    amount = 500.0 if number % 2 else None
    opened = FIRST + MINUTE * number
    prices = (100.0 + number, 102.0 + number, 99.0 + number, 101.0 + number)
    candle = Candle(opened, *prices, 5.0 + number, amount)
    return Bar(candle, int(number == 7), number == 11, opened + MINUTE + number)


@pytest.fixture(params=DUMPS, ids=lambda path: path.stem)
async def state(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[State]:
    opened = await State.open(_restore_dump(request.param, tmp_path / "state.sqlite"))
    yield opened
    await opened.close()


def test_there_is_a_dump_of_each_older_version() -> None:
    assert [path.stem for path in DUMPS] == [f"v{n}" for n in range(1, SCHEMA_VERSION)]


async def test_upgrade_keeps_bars_watermarks_and_outcomes(state: State) -> None:
    for series in (BTC, ETH):
        assert await state.load(series, 100) == [_bar(number) for number in range(20)]
        assert await state.watermark(series) == (FIRST + 17 * MINUTE, 0)
        outcomes = await state.outcomes(series, 0)
        assert [one.result for one in outcomes] == ["skipped", "forecast"] * 4
        assert await state.last_relayed(series) == -1


async def test_upgrade_keeps_the_outbox_in_order(state: State) -> None:
    records = await state.undelivered("jsonl", 100)
    assert [orjson.loads(one.value)["payload"] for one in records] == [
        f"{series} {number}" for series in (BTC, ETH) for number in range(3)
    ]
    assert [one.sequence for one in records] == sorted({one.sequence for one in records})


@pytest.mark.parametrize("dump", DUMPS, ids=lambda path: path.stem)
def test_daemon_continues_with_an_older_file(dump: Path, tmp_path: Path) -> None:
    """It delivers the old records first, then forecasts; it refuses a newer schema."""
    output = tmp_path / "forecasts"
    with ExchangeProcess("--symbols", "1", "--timeframe", "1s") as exchange:
        settings = {
            **exchange.settings(),
            "SINKS": "jsonl",
            "JSONL__PATH": str(output),
            "MODEL": "nano",
            "LOOKBACK": "32",
            "HORIZON": "2",
            "PATHS": "4",
            "QUANTILES": "0.5",
            "OUTBOX_MAX_AGE": "1e10",
        }
        with DaemonProcess(tmp_path, settings) as daemon:
            _restore_dump(dump, daemon.state_file)
            daemon.start()
            daemon.wait_until_ready()

            wait_for("bars are forecast", output.exists)
            letters = output.with_name("forecasts.deadletter").read_bytes().splitlines()
            assert [orjson.loads(line)["payload"] for line in letters] == [
                f"{series} {number}" for series in (BTC, ETH) for number in range(3)
            ]
            assert daemon.stop() == 0
            assert any(one["event"] == "state file upgraded" for one in daemon.log_records())
            with closing(sqlite3.connect(daemon.state_file)) as file:
                file.execute("PRAGMA user_version = 99")
            daemon.start()
            assert daemon.wait() == 2
            (line,) = (one["event"] for one in daemon.log_records())
    assert "newer version (schema 99" in line
    assert "use that version" in line
