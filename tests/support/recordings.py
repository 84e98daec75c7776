"""Candle files and captures to replay, and a recorder of what a replay pushes."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kronos_connectors.replay.replay_clock import driven_advance
from kronos_connectors.replay.source import Recording, ReplaySource
from kronos_stream.interfaces.source import SourceCallbacks
from kronos_stream.market.candle import Update
from kronos_stream.market.clock import Clock, ManualClock
from kronos_stream.market.series import Series
from kronos_stream.testing.market import START_MS, Market

MINUTE = 60_000


BTC = Series.parse("binance:BTC/USDT:1m")


class RecordingCallbacks:
    """Keeps what a source reports, and when."""

    def __init__(self, clock: Clock) -> None:
        self.updates: list[Update] = []
        self.times: list[int] = []
        self.rejected: list[tuple[Series | None, str, bytes]] = []
        self._clock = clock

    @property
    def callbacks(self) -> SourceCallbacks:
        return SourceCallbacks(
            self._update, lambda *what: self.rejected.append(what), lambda _: None
        )

    def _update(self, update: Update) -> None:
        self.updates.append(update)
        self.times.append(self._clock.now())


def kline(bar: int, event: float, price: str = "7", *, closed: bool) -> tuple[float, str]:
    """Frame of the ``bar``-th minute, sent ``event`` s after the start, received 0.1 s later."""
    opened = START_MS + bar * MINUTE
    bar_fields = {"t": opened, "T": opened + MINUTE - 1, "s": "BTCUSDT", "i": "1m", "x": closed}
    bar_fields |= {"o": price, "c": price, "h": price, "l": price, "v": "2", "q": "14"}
    sent = START_MS + round(event * 1000)
    data = {"e": "kline", "E": sent, "s": "BTCUSDT", "k": bar_fields}
    return sent / 1000 + 0.1, json.dumps({"stream": "btcusdt@kline_1m", "data": data})


async def yield_once() -> None:
    """Let other tasks run: an idle daemon for tests without one."""
    await asyncio.sleep(0)


def replayed(
    files: Sequence[str], start: int | None = None, *, lookback: int = 1, **options: Any
) -> RecordingCallbacks:
    """Replay ``files`` as fast as possible; returns everything that was received."""
    recording = Recording.read(files)
    start = recording.start(lookback) if start is None else start
    clock = ManualClock(start)
    received = RecordingCallbacks(clock)
    source = ReplaySource(
        recording,
        clock,
        start,
        advance_to=driven_advance(clock, yield_once, lambda: None),
        **options,
    )
    source.subscribe(recording.series)
    asyncio.run(source.run(received.callbacks))
    return received


def write_candles(
    folder: Path,
    name: str,
    bars: int = 20,
    *,
    timeframe: int = MINUTE,
    start: int = START_MS,
    without: Sequence[int] = (),
    amount: bool = True,
) -> str:
    """Write ``bars`` generated bars to a CSV file, except those numbered in ``without``."""
    candles = Market(1, timeframe, seed=3, start_ms=start).run(bars)
    rows = candles.values  # noqa: PD011 - an array, no pandas object's
    kept = np.setdiff1d(np.arange(bars), without)
    columns = ["open", "high", "low", "close", "volume", "amount"]
    frame = pd.DataFrame(rows[kept, 0], columns=columns)
    frame.insert(0, "time", candles.times[kept])
    path = folder / name
    frame[frame.columns[: None if amount else -1]].to_csv(path, index=False)
    return str(path)


def write_capture(
    folder: Path,
    name: str,
    frames: Sequence[tuple[float, str]],
    url: str = "wss://data-stream.binance.vision/stream?streams=btcusdt@kline_1m",
) -> str:
    """Write ``frames``, each with its time of arrival in seconds, as a capture."""
    head = f"{url} <-> {START_MS / 1000}\n"
    text = head + "".join(f"{received}: {frame}\n" for received, frame in frames)
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)
