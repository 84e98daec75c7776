"""Bars of the simulated exchange, and its command."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest

from kronos_stream.market.candle import Bar
from kronos_stream.market.candle_files import CandleFileError, read_candles
from kronos_stream.market.clock import LoopClock
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.testing.exchange import ExchangeError, SimulatedExchange
from kronos_stream.testing.exchange.bar_simulator import bar_open_time
from kronos_stream.testing.virtual_time import run_virtual

START = 1_750_000_000_000
STEPS = {"1s": 1_000, "5s": 5_000, "1m": 60_000, "1h": 3_600_000}


def true_bars(
    seconds: float, starts: dict[str, int], start: int = START, **options: Any
) -> dict[str, list[Bar]]:
    """True bars of series, each from a time on, after an exchange has run for ``seconds``."""

    async def main() -> dict[str, list[Bar]]:
        async with SimulatedExchange(clock=LoopClock(start), **options) as exchange:
            await asyncio.sleep(seconds)
            return {
                name: exchange.truth(Series.parse(f"any:{name}"), since)
                for name, since in starts.items()
            }

    return run_virtual(main())


@pytest.mark.parametrize(
    ("timeframe", "moment", "expected"),
    [
        ("5m", "2025-06-15T15:08:59", "2025-06-15T15:05:00"),
        ("4h", "2025-06-15T15:08:59", "2025-06-15T12:00:00"),
        ("1d", "2025-06-15T15:08:59", "2025-06-15T00:00:00"),
        ("1w", "2025-06-15T15:08:59", "2025-06-09T00:00:00"),  # a Monday
        ("1M", "2024-02-29T15:08:59", "2024-02-01T00:00:00"),
        ("3M", "2025-06-15T15:08:59", "2025-04-01T00:00:00"),
    ],
)
def test_bars_open_at_the_times_of_the_venue(timeframe: str, moment: str, expected: str) -> None:
    def ms(text: str) -> int:
        return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)

    assert bar_open_time(Timeframe.parse(timeframe), ms(moment)) == ms(expected)


def test_long_bars_are_made_of_short_ones() -> None:
    names = {f"SIM0{i}/USDT:{t}": 0 for i in range(3) for t in STEPS}
    truth = true_bars(400, names, symbols=3, timeframes=tuple(STEPS), history=2, keep=20_000)
    for i in range(3):
        seconds = {bar.candle.time: bar.candle for bar in truth[f"SIM0{i}/USDT:1s"]}
        for timeframe, step in STEPS.items():
            bars = truth[f"SIM0{i}/USDT:{timeframe}"]
            assert len(bars) >= 2
            for previous, bar in pairwise(bars):
                assert bar.candle.time == previous.candle.time + step
            for bar in bars:
                time, opened, high, low, close, volume, amount = bar.candle
                parts = [seconds[at] for at in range(time, time + step, 1000)]
                assert time % step == 0
                assert (opened, close) == (parts[0].open, parts[-1].close)
                assert high == max(part.high for part in parts)
                assert low == min(part.low for part in parts)
                assert volume == pytest.approx(sum(part.volume for part in parts))
                assert amount == pytest.approx(sum(part.amount or 0 for part in parts))


def test_history_has_the_given_length_and_memory_is_bounded() -> None:
    bars = true_bars(0, {"SIM00/USDT:1m": 0}, symbols=1, timeframes=("1s", "1m"), history=30)
    assert [bar.candle.time // 60_000 for bar in bars["SIM00/USDT:1m"]] == [
        START // 60_000 - 30 + i for i in range(30)
    ]
    bars = true_bars(1_000, {"SIM00/USDT:1s": 0}, symbols=1, history=10, keep=200)
    kept = bars["SIM00/USDT:1s"]
    assert 200 <= len(kept) <= 251
    assert kept[-1].candle.time == START + 999_000


def test_market_depends_on_the_seed() -> None:
    def market(seed: int) -> list[Bar]:
        return true_bars(20, {"SIM01/USDT:1s": 0}, symbols=2, history=50, seed=seed)[
            "SIM01/USDT:1s"
        ]

    assert market(1) == market(1)
    assert market(1) != market(2)


@pytest.mark.parametrize(
    "options",
    [
        {"timeframes": ("1s", "1d"), "history": 600},
        {"timeframes": ("2m", "3m")},
        {"timeframes": ("1M",)},
    ],
)
def test_invalid_timeframes_and_history_are_rejected(options: dict[str, Any]) -> None:
    with pytest.raises(ExchangeError):
        SimulatedExchange(**options)


# -- files ---------------------------------------------------------------------------------


def write(path: Path, rows: int, hole: range = range(0)) -> Path:
    lines = [
        f"{1_600_000_020 + 60 * i},{i}.5,{i + 1}.25,{i}.25,{i + 1},{i},{i * 10}\n"
        for i in range(rows)
        if i not in hole
    ]
    path.write_text("time,open,high,low,close,volume,amount\n" + "".join(lines))
    return path


def test_candles_of_files_are_replayed_at_the_present_time(tmp_path: Path) -> None:
    a = write(tmp_path / "BTCUSDT-1m.csv", 40, hole=range(22, 24))
    b = write(tmp_path / "gold.csv", 20)
    table = read_candles(a)
    truth = true_bars(
        30 * 60, {"BTC/USDT:1m": 0, "GOLD/USDT:1m": 0}, start=START, candles=(a, b), history=5
    )
    bars = truth["BTC/USDT:1m"]
    now = START // 60_000 * 60_000
    assert [bar.candle.time for bar in bars] == [now + 60_000 * i for i in range(-5, 30)]
    assert [bar.synthetic for bar in bars] == [i in {22, 23} for i in range(35)]
    known = [list(bar.candle[1:]) for bar in bars if not bar.synthetic]
    np.testing.assert_array_equal(known, table.values[: len(known)])
    flat = bars[22].candle
    assert flat[1:] == (bars[21].candle.close,) * 4 + (0.0, 0.0)
    # The shorter file starts again.
    gold = [bar.candle.volume for bar in truth["GOLD/USDT:1m"]]
    assert gold == [float(i % 20) for i in range(35)]


def test_files_of_different_timeframes_or_equal_names_are_rejected(tmp_path: Path) -> None:
    minutes = write(tmp_path / "A.csv", 10)
    hours = tmp_path / "B.csv"
    hours.write_text("time,open,high,low,close\n" + "1600002000,1,1,1,1\n1600005600,1,1,1,1\n")
    with pytest.raises(CandleFileError, match="timeframe"):
        SimulatedExchange(candles=(minutes, hours))
    (tmp_path / "again").mkdir()
    with pytest.raises(CandleFileError, match="AUSDT"):
        SimulatedExchange(candles=(minutes, write(tmp_path / "again" / "A.csv", 10)))


# -- the command ---------------------------------------------------------------------------

COMMAND = (
    sys.executable,
    "-c",
    "from kronos_stream.commands.exchange import exchange; exchange()",
    "--json",
    "--symbols=2",
    "--seed=7",
)


def start(*arguments: str) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    process = subprocess.Popen(  # noqa: S603
        (*COMMAND, *arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_prints_when_it_is_ready_and_ends_cleanly(number: signal.Signals) -> None:
    process, facts = start()
    with process:
        assert facts["symbols"] == ["SIM00/USDT", "SIM01/USDT"]
        assert facts["ws"].startswith("ws://127.0.0.1:")
        with urlopen(facts["rest"] + "/api/v3/ping") as answer:  # noqa: S310
            assert answer.read() == b"{}"
        process.send_signal(number)
        assert process.wait(300) == 0


def test_command_ends_with_its_parent() -> None:
    script = f"""
import subprocess, sys
child = subprocess.Popen({(*COMMAND, "--with-parent")!r}, stdin=subprocess.PIPE)
sys.stdin.read()
"""
    parent = subprocess.Popen(  # noqa: S603
        (sys.executable, "-c", script), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with parent:
        assert parent.stdout is not None
        url = json.loads(parent.stdout.readline())["rest"]
        parent.kill()
        # The child holds the other end of our pipe for as long as it lives.
        os.set_blocking(parent.stdout.fileno(), True)
        assert parent.stdout.read() == b""
    with pytest.raises(OSError, match="refused"):
        urlopen(url + "/api/v3/ping", timeout=60)  # noqa: S310
