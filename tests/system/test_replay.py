"""Replays through the whole daemon: forecasts equal those sampled directly from the same bars.

With KRONOS_CANDLE_DATA=FOLDER also for the folder's ``SYMBOL-TIMEFRAME.csv.gz``.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import pandas as pd
import pytest

from kronos_stream import Forecaster
from kronos_stream.client import forecasts
from kronos_stream.market.series import Series
from kronos_stream.market.utc import parse_time, rfc3339
from kronos_stream.testing.broker import EmbeddedBroker
from kronos_stream.testing.market import START_MS, Market
from tests.support.replay import (
    COLUMNS,
    MINUTE,
    WIRE,
    Bars,
    Replay,
    ReplayOutput,
    check_forecasts,
    fill_gaps,
    read_bars,
    read_frames,
    replay_command,
    replay_environment,
    run_replay,
)


@pytest.fixture
def replay(tmp_path: Path) -> Replay:
    """Run the command: ``replay(files, "--bars", 5, SEED=1)``."""

    def replay(files: Sequence[object], *arguments: object, **settings: object) -> ReplayOutput:
        out = tmp_path / "forecasts.jsonl"
        out.unlink(missing_ok=True)
        done = run_replay(*files, *arguments, "--out", out, "--json", **settings)
        assert done.returncode == 0, done.stderr
        messages = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        return ReplayOutput(json.loads(done.stdout), messages)

    return replay


@pytest.fixture(scope="module")
def nano() -> Forecaster:
    return Forecaster.from_pretrained("nano", device="cpu", dtype="float32")


@pytest.fixture
def market(tmp_path: Path) -> dict[str, Path]:
    """Files by series: complete, with gaps, without amounts, late, ending early, slower."""

    def write(name: str, symbol: int, timeframe: int, bars: slice, *gaps: int) -> Path:
        candles = Market(5, timeframe, seed=11).run(60)
        kept = [i for i in range(60)[bars] if i not in gaps]
        frame = pd.DataFrame(candles.values[kept, symbol], columns=COLUMNS)  # noqa: PD011
        frame.insert(0, "timestamp", candles.times[kept])
        path = tmp_path / name
        frame.drop(columns=["amount"] if symbol == 1 else []).to_csv(path, index=False)
        return path

    every = slice(None)
    return {
        "replay:AA/USD:5m": write("AA_USD-5m.csv", 0, 5 * MINUTE, every),
        "replay:BB/USD:5m": write("BB_USD-5m.csv", 1, 5 * MINUTE, every, 20, 44, 45, 46, 58),
        "replay:CC/USD:5m": write("CC_USD-5m.csv", 2, 5 * MINUTE, slice(10, None), 42),
        "replay:DD/USD:5m": write("DD_USD-5m.csv.gz", 3, 5 * MINUTE, slice(50)),
        "replay:EE/USD:1m": write("EE_USD-1m.csv", 4, MINUTE, every, 41),
    }


def test_forecasts_equal_those_sampled_directly(
    replay: Replay, nano: Forecaster, market: dict[str, Path]
) -> None:
    lookback = 36
    figures, messages = replay(market.values(), "--lookback", lookback)
    recorded = {name: read_bars(path) for name, path in market.items()}
    assert check_forecasts(nano, messages, recorded, lookback) == figures["forecasts"]
    # The first minutes decide the start; each forecast has at least 32 bars of context.
    begin = START_MS + (lookback - 1) * MINUTE
    for name, bars in recorded.items():
        after = Series.parse(name).timeframe.after
        slots = list(fill_gaps(bars, Series.parse(name).timeframe)[0])
        due = [time for time in slots if after(time) > begin]
        forecast = [parse_time(one["origin"]) for one in messages if one["series"] == name]
        assert forecast == [time for time in due if slots.index(time) >= 31], name
    assert figures["synthetic"] == 7
    slots_due = figures["forecasts"] + sum(figures["skipped"].values())
    assert figures["bars"] == slots_due
    assert set(figures["skipped"]) == {"warming up"}
    assert figures["degraded"] == sum(one["degraded"] for one in messages) > 0


def test_replay_from_a_time_starts_with_history(
    replay: Replay, nano: Forecaster, market: dict[str, Path]
) -> None:
    name = "replay:BB/USD:5m"
    begin = START_MS + 45 * 5 * MINUTE
    figures, messages = replay(
        [market[name]], "--lookback", 32, "--from", rfc3339(begin), "--bars", 4, SEED=5
    )
    # Bars 45 and 46 are not in the file.
    assert [parse_time(one["origin"]) for one in messages] == [
        begin + step * 5 * MINUTE for step in range(6)
    ]
    assert check_forecasts(nano, messages, {name: read_bars(market[name])}, 32, seed=5) == 6
    assert figures["skipped"] == {}


def test_captured_frames_are_forecast_like_candles(replay: Replay, nano: Forecaster) -> None:
    captures = sorted(WIRE.glob("*.frames"))
    figures, messages = replay(captures, "--lookback", 8)
    recorded: dict[str, Bars] = {}
    for path in captures:
        recorded |= read_frames(path)
    assert check_forecasts(nano, messages, recorded, 8) == figures["forecasts"]
    bars = sum(map(len, recorded.values()))
    # The first seven bars of a series are too few for a context.
    assert figures["forecasts"] == bars - 7 * len(recorded) > 100
    assert figures["skipped"] == {"warming up": 7 * len(recorded)}
    assert figures["synthetic"] == 0


def test_with_a_speed_every_bar_has_an_outcome_and_forecasts_are_the_same(
    replay: Replay, nano: Forecaster, market: dict[str, Path]
) -> None:
    name = "replay:EE/USD:1m"
    figures, messages = replay([market[name]], "--lookback", 36, "--speed", 600)
    assert (
        check_forecasts(nano, messages, {name: read_bars(market[name])}, 36) == figures["forecasts"]
    )
    assert figures["bars"] == 60 - 35
    assert figures["seconds"] > 2.3
    assert figures["forecasts"] > 0


def test_closed_hours_are_forecast_and_nothing_is_late(
    replay: Replay, market: dict[str, Path], nano: Forecaster, tmp_path: Path
) -> None:
    bars = pd.read_csv(market["replay:AA/USD:5m"])
    path = tmp_path / "AA_USD-5m.csv"
    closed = 30
    pd.concat((bars[:20], bars[20 + closed :])).to_csv(path, index=False)
    figures, messages = replay([path], "--lookback", 16)
    assert figures["skipped"] == {}
    assert figures["synthetic"] == closed
    assert figures["bars"] == figures["forecasts"] == len(bars) - 15
    assert (
        check_forecasts(nano, messages, {"replay:AA/USD:5m": read_bars(path)}, 16)
        == figures["forecasts"]
    )


def test_replay_continues_where_the_last_one_ended(
    replay: Replay, market: dict[str, Path], tmp_path: Path
) -> None:
    state = tmp_path / "state.sqlite"
    path = market["replay:AA/USD:5m"]
    arguments = "--lookback", 36, "--state", state
    first = replay([path], *arguments, "--bars", 10).messages
    second = replay([path], *arguments).messages
    origins = [parse_time(one["origin"]) for one in first + second]
    assert origins == [START_MS + bar * 5 * MINUTE for bar in range(35, 60)]


async def test_kafka_gets_all_forecasts(market: dict[str, Path]) -> None:
    files = [market["replay:AA/USD:5m"], market["replay:BB/USD:5m"]]
    topics = (f"kronos.{name}.v1" for name in ("forecasts", "forecasts.latest", "deadletter"))
    with EmbeddedBroker(topics) as broker:
        arguments = "--lookback", 36, "--bars", 8, "--kafka", broker.bootstrap, "--json"
        done = await asyncio.to_thread(run_replay, *files, *arguments)
        assert done.returncode == 0, done.stderr
        origins: dict[str, list[int]] = {}
        # These forecasts expired long ago.
        async with aclosing(forecasts(broker.bootstrap, start="earliest", expired=True)) as found:
            for _ in range(json.loads(done.stdout)["forecasts"]):
                one = await anext(found)
                opened = round(one.origin.timestamp() * 1000 - START_MS) // (5 * MINUTE)
                origins.setdefault(one.series, []).append(opened)
    assert set(origins) == {"replay:AA/USD:5m", "replay:BB/USD:5m"}
    assert all(opens == [*range(35, 43)] for opens in origins.values())


@pytest.mark.parametrize("speed", ["1", "max"])
def test_ctrl_c_ends_a_replay_in_order(tmp_path: Path, speed: str) -> None:
    candles = Market(1, MINUTE, seed=2).run(3_000 if speed == "max" else 100)
    frame = pd.DataFrame(candles.values[:, 0], columns=COLUMNS)  # noqa: PD011
    frame.insert(0, "time", candles.times)
    path = tmp_path / "A_B.parquet"
    frame.to_parquet(path)
    out = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        replay_command(path, "--lookback", 36, "--speed", speed, "--json", "--out", out),
        env=replay_environment(LOG__LEVEL="info"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "following" in line:
            break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["forecasts"] == len(out.read_text("utf-8").splitlines())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nothing.csv"], "nothing.csv: no such file"),
        (["AA", "--speed", "fast"], "'fast': expected max, or a number"),
        (["AA", "--from", "soon"], "time 'soon': expected ISO 8601"),
        (["AA", "--lookback", "61"], "no bar closes after 2024-01-01T05:00:00Z"),
        (["AA", "--out", "a", "--kafka", "b"], "--out and --kafka exclude each other"),
        (["AA", "AA"], "has the same series, replay:AA/USD:5m"),
        (["AA", "--model", "no/such", "--lookback", "36"], "no/such"),
    ],
)
def test_invalid_arguments_give_a_one_line_error(
    market: dict[str, Path], arguments: list[str], complaint: str
) -> None:
    path = str(market["replay:AA/USD:5m"])
    done = run_replay(*(path if argument == "AA" else argument for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif("KRONOS_CANDLE_DATA" not in os.environ, reason="no KRONOS_CANDLE_DATA")
def test_real_candles(replay: Replay, nano: Forecaster) -> None:
    """The first KRONOS_CANDLE_BARS bars of each file, 50 by default."""
    folder = Path(os.environ["KRONOS_CANDLE_DATA"])
    bars = os.environ.get("KRONOS_CANDLE_BARS", "50")
    compared, seconds = 0, 0.0
    groups: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.glob("*.csv.gz")):
        symbol, _, timeframe = path.name.partition(".")[0].partition("-")
        name = f"replay:{symbol.replace('_', '/')}:{timeframe}"
        groups.setdefault(symbol.rpartition("_")[2], {})[name] = path
    for group in groups.values():
        figures, messages = replay(group.values(), "--lookback", 96, "--bars", bars)
        compared += check_forecasts(nano, messages, {n: read_bars(p) for n, p in group.items()}, 96)
        seconds += figures["seconds"]
        assert figures["forecasts"] == len(messages) > 0
    print(f"{compared} forecasts are equal, {compared / seconds:.0f} a second")  # noqa: T201
