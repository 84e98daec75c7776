"""Runs of the command ``replay``, and the check of its forecasts by direct sampling."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kronos_stream import Context, Forecaster
from kronos_stream.forecast.outlook import build_outlook
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.utc import parse_time, rfc3339
from tests.support.paths import DATA
from tests.support.processes import settings_environment

MINUTE = 60_000
COLUMNS = ["open", "high", "low", "close", "volume", "amount"]
HORIZON, PATHS, QUANTILES = 4, 19, (0.05, 0.5, 0.95)
WIRE = DATA / "wire"

Bars = dict[int, list[float]]
"""Open → open, high, low, close, volume and, if known, amount."""


class ReplayOutput(NamedTuple):
    """Figures and forecasts of a replay."""

    figures: dict[str, Any]
    messages: list[dict[str, Any]]


Replay = Callable[..., ReplayOutput]


def replay_environment(**settings: object) -> dict[str, str]:
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
    return settings_environment(own)


def replay_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "kronos_stream", "replay", *map(str, arguments)]


def run_replay(*arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        replay_command(*arguments),
        env=replay_environment(**settings) | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def fill_gaps(bars: Bars, timeframe: Timeframe) -> tuple[Bars, set[int]]:
    """Bars without gaps, and which of them are synthetic: flat, at the previous close."""
    filled: Bars = {}
    synthetic: set[int] = set()
    opened, last = min(bars), max(bars)
    while opened <= last:
        if opened not in bars:
            synthetic.add(opened)
            previous = list(filled.values())[-1]
            filled[opened] = [previous[3]] * 4 + [0.0] * (len(previous) - 4)
        else:
            filled[opened] = bars[opened]
        opened = timeframe.after(opened)
    return filled, synthetic


def check_forecasts(
    nano: Forecaster,
    messages: Sequence[Mapping[str, Any]],
    recorded: Mapping[str, Bars],
    lookback: int,
    seed: int = 0,
) -> int:
    """Sample every forecast directly, compare bit for bit, and return how many there are."""
    contexts, windows, scales, missing = [], [], [], []
    tables = {
        name: fill_gaps(bars, Series.parse(name).timeframe) for name, bars in recorded.items()
    }
    opens = {name: list(bars) for name, (bars, _) in tables.items()}
    for message in messages:
        name, scale = message["series"], message["context"]["scale"]
        bars, synthetic = tables[name]
        end = opens[name].index(parse_time(message["origin"])) + 1
        times = opens[name][max(0, end - lookback) : end]
        values = np.array([bars[time] for time in times], np.float32)
        contexts.append(
            Context(_scaled(values, scale), times, series=name, timeframe=message["timeframe"])
        )
        windows.append(times)
        scales.append(scale)
        missing.append(len(synthetic & set(times)))
        assert message["last"] == dict(zip(COLUMNS[:5], bars[times[-1]], strict=False))
    sampled = nano.sample(
        contexts, HORIZON, PATHS, temperature=1.0, top_p=0.9, seed=seed, anchor=True
    )
    for message, times, scale, paths, count in zip(
        messages, windows, scales, sampled, missing, strict=True
    ):
        _compare(message, times, _scaled(paths, 1 / scale), count)
    return len(messages)


def _compare(
    message: Mapping[str, Any], opens: list[int], paths: NDArray[np.float32], missing: int
) -> None:
    assert paths[..., 3].tobytes() == np.array(message["paths"], np.float32).tobytes()
    after = Series.parse(message["series"]).timeframe.after
    times = [after(opens[-1], step) for step in range(1, HORIZON + 1)]
    outlook = build_outlook(paths, times, message["last"]["close"], QUANTILES, publish="ohlcva")
    assert message["times"] == [rfc3339(time) for time in times]
    assert {name: message[name] for name in COLUMNS[:5]} == outlook.channels
    assert message["summary"] == outlook.summary.to_dict()
    assert message["repaired"] == outlook.repaired
    assert message["other_paths"] == outlook.other_paths
    assert message["context"]["synthetic"] == missing
    assert message["context"]["bars"] == len(opens)
    assert message["degraded"] or not missing


def _scaled(values: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """Prices and amounts times ``scale``."""
    factors = np.array([scale, scale, scale, scale, 1, scale], np.float32)
    return values * factors[: values.shape[-1]]


def read_bars(path: Path) -> Bars:
    """Bars of a file, read without our code."""
    table = pd.read_csv(path)
    return {int(row[0]): list(row[1:]) for row in table.itertuples(index=False)}


def read_frames(path: Path) -> dict[str, Bars]:
    """Closed bars of captured frames, read without our code."""
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
