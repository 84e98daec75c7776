"""Replays through the whole daemon: its forecasts are those drawn by hand from the same bars.

With KRONOS_CANDLE_DATA=FOLDER also for the folder's ``SYMBOL-TIMEFRAME.csv.gz``.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from kronos_stream import Context, Forecaster
from kronos_stream.client import forecasts
from kronos_stream.forecast.outlook import build_outlook
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.utc import parse_time, rfc3339
from kronos_stream.testing.broker import EmbeddedBroker
from kronos_stream.testing.market import START_MS, Market
from tests.support.paths import DATA

MINUTE = 60_000
COLUMNS = ["open", "high", "low", "close", "volume", "amount"]
HORIZON, PATHS, QUANTILES = 4, 19, (0.05, 0.5, 0.95)
WIRE = DATA / "wire"

Bars = dict[int, list[float]]
"""Open → open, high, low, close, volume and, if known, amount."""


class ReplayOutput(NamedTuple):
    """What a replay told."""

    figures: dict[str, Any]
    messages: list[dict[str, Any]]


Replay = Callable[..., ReplayOutput]


def _environment(**settings: object) -> dict[str, str]:
    own = {
        "MODEL": "nano",
        "DEVICE": "cpu",
        "DTYPE": "float32",
        "THREADS": "1",
        "HORIZON": HORIZON,
        "PATHS": PATHS,
        "QUANTILES": ",".join(map(str, QUANTILES)),
        "FORECAST__PATHS": "ohlcva",
        **settings,
    }
    others = {k: v for k, v in os.environ.items() if not k.startswith("KRONOS_STREAM_")}
    return others | {f"KRONOS_STREAM_{name}": str(value) for name, value in own.items()}


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "kronos_stream", "replay", *map(str, arguments)]


def _run(*arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(*arguments),
        env=_environment(**settings) | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def replay(tmp_path: Path) -> Replay:
    """Runs the command: ``replay(files, "--bars", 5, SEED=1)``."""

    def replay(files: Sequence[object], *arguments: object, **settings: object) -> ReplayOutput:
        out = tmp_path / "forecasts.jsonl"
        out.unlink(missing_ok=True)
        done = _run(*files, *arguments, "--out", out, "--json", **settings)
        assert done.returncode == 0, done.stderr
        messages = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        return ReplayOutput(json.loads(done.stdout), messages)

    return replay


@pytest.fixture(scope="module")
def nano() -> Forecaster:
    return Forecaster.from_pretrained("nano", device="cpu", dtype="float32")


def whole(bars: Bars, timeframe: Timeframe) -> tuple[Bars, set[int]]:
    """``bars`` without holes, and which were made up: flat, at the close before."""
    made: Bars = {}
    up: set[int] = set()
    opened, last = min(bars), max(bars)
    while opened <= last:
        if opened not in bars:
            up.add(opened)
            before = list(made.values())[-1]
            made[opened] = [before[3]] * 4 + [0.0] * (len(before) - 4)
        else:
            made[opened] = bars[opened]
        opened = timeframe.after(opened)
    return made, up


def check(
    nano: Forecaster,
    messages: Sequence[Mapping[str, Any]],
    recorded: Mapping[str, Bars],
    lookback: int,
    seed: int = 0,
) -> int:
    """Draw every forecast by hand, and compare bit for bit; how many there were."""
    contexts, windows, scales, flaws = [], [], [], []
    tables = {name: whole(bars, Series.parse(name).timeframe) for name, bars in recorded.items()}
    opens = {name: list(bars) for name, (bars, _) in tables.items()}
    for message in messages:
        name, scale = message["series"], message["context"]["scale"]
        bars, up = tables[name]
        end = opens[name].index(parse_time(message["origin"])) + 1
        times = opens[name][max(0, end - lookback) : end]
        values = np.array([bars[time] for time in times], np.float32)
        contexts.append(
            Context(_scaled(values, scale), times, series=name, timeframe=message["timeframe"])
        )
        windows.append(times)
        scales.append(scale)
        flaws.append(len(up & set(times)))
        assert message["last"] == dict(zip(COLUMNS[:5], bars[times[-1]], strict=False))
    drawn = nano.sample(
        contexts, HORIZON, PATHS, temperature=1.0, top_p=0.9, seed=seed, anchor=True
    )
    for message, times, scale, paths, missing in zip(
        messages, windows, scales, drawn, flaws, strict=True
    ):
        _compare(message, times, _scaled(paths, 1 / scale), missing)
    return len(messages)


def _compare(
    message: Mapping[str, Any], opens: list[int], paths: NDArray[np.float32], missing: int
) -> None:
    assert paths[..., 3].tobytes() == np.array(message["paths"], np.float32).tobytes()
    after = Series.parse(message["series"]).timeframe.after
    times = [after(opens[-1], step) for step in range(1, HORIZON + 1)]
    made = build_outlook(paths, times, message["last"]["close"], QUANTILES, publish="ohlcva")
    assert message["times"] == [rfc3339(time) for time in times]
    assert {name: message[name] for name in COLUMNS[:5]} == made.channels
    assert message["summary"] == made.summary.to_dict()
    assert message["repaired"] == made.repaired
    assert message["other_paths"] == made.other_paths
    assert message["context"]["synthetic"] == missing
    assert message["context"]["bars"] == len(opens)
    assert message["degraded"] or not missing


def _scaled(values: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """Prices and amounts times ``scale``."""
    factors = np.array([scale, scale, scale, scale, 1, scale], np.float32)
    return values * factors[: values.shape[-1]]


def read(path: Path) -> Bars:
    """A file's bars, by nothing of ours."""
    table = pd.read_csv(path)
    return {int(row[0]): list(row[1:]) for row in table.itertuples(index=False)}


@pytest.fixture
def market(tmp_path: Path) -> dict[str, Path]:
    """Files by series: whole, with holes, without amounts, beginning late, ending early, slower."""

    def write(name: str, symbol: int, timeframe: int, bars: slice, *holes: int) -> Path:
        candles = Market(5, timeframe, seed=11).run(60)
        kept = [i for i in range(60)[bars] if i not in holes]
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


def test_forecasts_equal_those_drawn_by_hand(
    replay: Replay, nano: Forecaster, market: dict[str, Path]
) -> None:
    lookback = 36
    figures, messages = replay(market.values(), "--lookback", lookback)
    recorded = {name: read(path) for name, path in market.items()}
    assert check(nano, messages, recorded, lookback) == figures["forecasts"]
    # The minutes begin; all have 32 bars at least when they are forecast, and a whole context
    # where there is one.
    begin = START_MS + (lookback - 1) * MINUTE
    for name, bars in recorded.items():
        after = Series.parse(name).timeframe.after
        slots = list(whole(bars, Series.parse(name).timeframe)[0])
        due = [time for time in slots if after(time) > begin]
        forecast = [parse_time(one["origin"]) for one in messages if one["series"] == name]
        assert forecast == [time for time in due if slots.index(time) >= 31], name
    assert figures["synthetic"] == 7
    slots_due = figures["forecasts"] + sum(figures["skipped"].values())
    assert figures["bars"] == slots_due
    assert set(figures["skipped"]) == {"warming up"}
    assert figures["degraded"] == sum(one["degraded"] for one in messages) > 0


def test_a_replay_from_a_time_on_begins_with_history(
    replay: Replay, nano: Forecaster, market: dict[str, Path]
) -> None:
    name = "replay:BB/USD:5m"
    begin = START_MS + 45 * 5 * MINUTE
    figures, messages = replay(
        [market[name]], "--lookback", 32, "--from", rfc3339(begin), "--bars", 4, SEED=5
    )
    # The 45th and the 46th bar are not in the file; ends come with bars.
    assert [parse_time(one["origin"]) for one in messages] == [
        begin + step * 5 * MINUTE for step in range(6)
    ]
    assert check(nano, messages, {name: read(market[name])}, 32, seed=5) == 6
    assert figures["skipped"] == {}


def test_captured_frames_are_forecast_as_candles_are(replay: Replay, nano: Forecaster) -> None:
    captures = sorted(WIRE.glob("*.frames"))
    figures, messages = replay(captures, "--lookback", 8)
    recorded: dict[str, Bars] = {}
    for path in captures:
        recorded |= closed_in(path)
    assert check(nano, messages, recorded, 8) == figures["forecasts"]
    bars = sum(map(len, recorded.values()))
    # The first bar of a series founds its tape; it and the next six are too few.
    assert figures["forecasts"] == bars - 7 * len(recorded) > 100
    assert figures["skipped"] == {"warming up": 7 * len(recorded)}
    assert figures["synthetic"] == 0


def closed_in(path: Path) -> dict[str, Bars]:
    """The last words on bars in a capture, by nothing of ours."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    futures = ":USDT" if "fstream" in text.partition("\n")[0] else ""
    found: dict[str, Bars] = {}
    for line in text.splitlines():
        if '"e":"kline"' not in line or '"x":true' not in line:
            continue
        kline = json.loads(line[line.index("{") :])["data"]["k"]
        symbol = re.sub("USDT$", "/USDT", kline["s"])
        name = f"binance:{symbol}{futures}:{kline['i']}"
        found.setdefault(name, {})[kline["t"]] = [float(kline[field]) for field in "ohlcvq"]
    return found


def test_at_a_speed_every_bar_has_an_outcome_and_forecasts_are_the_same(
    replay: Replay, nano: Forecaster, market: dict[str, Path]
) -> None:
    name = "replay:EE/USD:1m"
    figures, messages = replay([market[name]], "--lookback", 36, "--speed", 600)
    assert check(nano, messages, {name: read(market[name])}, 36) == figures["forecasts"]
    assert figures["bars"] == 60 - 35
    assert figures["seconds"] > 2.3
    assert figures["forecasts"] > 0


def test_hours_the_market_was_closed_are_forecast_too_and_nothing_is_late(
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
    assert check(nano, messages, {"replay:AA/USD:5m": read(path)}, 16) == figures["forecasts"]


def test_another_replay_goes_on_where_one_ended(
    replay: Replay, market: dict[str, Path], tmp_path: Path
) -> None:
    state = tmp_path / "state.sqlite"
    path = market["replay:AA/USD:5m"]
    arguments = "--lookback", 36, "--state", state
    first = replay([path], *arguments, "--bars", 10).messages
    second = replay([path], *arguments).messages
    origins = [parse_time(one["origin"]) for one in first + second]
    assert origins == [START_MS + bar * 5 * MINUTE for bar in range(35, 60)]


async def test_kafka_gets_all_of_it(market: dict[str, Path]) -> None:
    files = [market["replay:AA/USD:5m"], market["replay:BB/USD:5m"]]
    topics = (f"kronos.{name}.v1" for name in ("forecasts", "forecasts.latest", "deadletter"))
    with EmbeddedBroker(topics) as broker:
        arguments = "--lookback", 36, "--bars", 8, "--kafka", broker.bootstrap, "--json"
        done = await asyncio.to_thread(_run, *files, *arguments)
        assert done.returncode == 0, done.stderr
        origins: dict[str, list[int]] = {}
        # To a reader of today they have expired.
        async with aclosing(forecasts(broker.bootstrap, start="earliest", expired=True)) as found:
            for _ in range(json.loads(done.stdout)["forecasts"]):
                one = await anext(found)
                opened = round(one.origin.timestamp() * 1000 - START_MS) // (5 * MINUTE)
                origins.setdefault(one.series, []).append(opened)
    assert set(origins) == {"replay:AA/USD:5m", "replay:BB/USD:5m"}
    assert all(opens == [*range(35, 43)] for opens in origins.values())


@pytest.mark.parametrize("speed", ["1", "max"])
def test_ctrl_c_ends_it_in_order(tmp_path: Path, speed: str) -> None:
    candles = Market(1, MINUTE, seed=2).run(3_000 if speed == "max" else 100)
    frame = pd.DataFrame(candles.values[:, 0], columns=COLUMNS)  # noqa: PD011
    frame.insert(0, "time", candles.times)
    path = tmp_path / "A_B.parquet"
    frame.to_parquet(path)
    out = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        _command(path, "--lookback", 36, "--speed", speed, "--json", "--out", out),
        env=_environment(LOG__LEVEL="info"),
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
        (["AA", "AA"], "its series is replay:AA/USD:5m, as is that of"),
        (["AA", "--model", "no/such", "--lookback", "36"], "no/such"),
    ],
)
def test_what_cannot_be_replayed_is_one_clear_line(
    market: dict[str, Path], arguments: list[str], complaint: str
) -> None:
    path = str(market["replay:AA/USD:5m"])
    done = _run(*(path if argument == "AA" else argument for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif("KRONOS_CANDLE_DATA" not in os.environ, reason="no KRONOS_CANDLE_DATA")
def test_real_candles(replay: Replay, nano: Forecaster) -> None:
    """As many bars as KRONOS_CANDLE_BARS says, from each file's beginning; 50 by default."""
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
        compared += check(nano, messages, {n: read(p) for n, p in group.items()}, 96)
        seconds += figures["seconds"]
        assert figures["forecasts"] == len(messages) > 0
    print(f"{compared} forecasts equal, {compared / seconds:.0f} a second")  # noqa: T201
