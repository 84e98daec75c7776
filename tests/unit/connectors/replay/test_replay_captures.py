"""Replay of captured websocket frames."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from kronos_connectors.replay.source import Recording
from kronos_stream.interfaces.source import Traits
from kronos_stream.market.candle_files import CandleFileError
from kronos_stream.market.series import Series
from kronos_stream.testing.market import START_MS
from tests.support.recordings import (
    BTC,
    MINUTE,
    kline,
    replayed,
    write_candles,
    write_capture,
)

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return partial(write_candles, tmp_path)


@pytest.fixture
def capture(tmp_path: Path) -> Write:
    return partial(write_capture, tmp_path)


PERPETUAL = Series.parse("binance:BTC/USDT:USDT:1m")


def test_frames_are_decoded_and_arrive_at_their_recorded_times(capture: Write) -> None:
    frames = [
        kline(0, 58, "7.0", closed=False),
        (START_MS / 1000 + 59, '{"stream":"btcusdt@trade","data":{"e":"trade","p":"7"}}'),
        kline(0, 60.2, "7.1", closed=True),
        (START_MS / 1000 + 61, "no JSON at all"),
        kline(1, 62, "7.2", closed=False),
        kline(1, 120.1, "7.3", closed=True),
    ]
    received = replayed([capture("frames.gz", frames)])
    bars = [(START_MS + MINUTE * (i // 2), bool(i % 2)) for i in range(4)]
    assert [(one.candle.time, one.closed) for one in received.updates] == bars
    assert [one.candle.close for one in received.updates] == [7.0, 7.1, 7.2, 7.3]
    assert {one.series for one in received.updates} == {BTC}
    seconds = [(time - START_MS) / 1000 for time in received.times]
    assert seconds == [58.1, 60.3, 62.1, 120.2]
    ((series, reason, raw),) = received.rejected
    assert series is None
    assert reason.startswith("not JSON")
    assert raw == b"no JSON at all"


@pytest.mark.parametrize(
    ("url", "series"),
    [
        ("wss://fstream.binance.com/stream?streams=btcusdt@kline_1m", PERPETUAL),
        ("wss://fstream.binance.com/market/stream", PERPETUAL),
        ("ws://127.0.0.1:8000/market/stream", PERPETUAL),
        ("ws://127.0.0.1:8000/stream", BTC),
    ],
)
def test_url_of_the_connection_selects_the_market(capture: Write, url: str, series: Series) -> None:
    path = capture("frames", [kline(0, 60, closed=True)], url)
    assert Recording.read([path]).series == {series}


def test_history_of_a_capture_has_bars_received_closed(capture: Write) -> None:
    frames = [kline(bar, bar * 60 + 60, str(bar + 1), closed=True) for bar in range(3)]
    frames.insert(1, kline(1, 90, "9", closed=False))
    recording = Recording.read([capture("frames", frames)])
    known = recording.history(BTC, START_MS, START_MS + 10 * MINUTE, START_MS + 120_100)
    assert [candle.close for candle in known] == [1.0, 2.0]
    assert recording.count(START_MS + 60_100) == 2
    early = recording.history(BTC, START_MS, START_MS + 10 * MINUTE, START_MS + 120_099)
    assert [candle.close for candle in early] == [1.0]


def test_candles_precede_a_capture_of_the_same_series(write: Write, capture: Write) -> None:
    path = "binance:BTC/USDT=" + write("b.csv", 20, start=START_MS - 10 * MINUTE)
    frames = [kline(bar, bar * 60 + 60, closed=True) for bar in range(5)]
    closed = replayed([path, capture("frames", [kline(0, 30, closed=False), *frames])]).updates
    assert closed.pop(10).closed is False
    assert [one.candle.time for one in closed] == [START_MS + bar * MINUTE for bar in range(-10, 5)]
    assert [one.candle.close == 7.0 for one in closed] == [False] * 10 + [True] * 5


def test_clock_of_the_recorder_set_back_does_not_set_time_back(capture: Write) -> None:
    frames = [kline(0, 60, closed=True), kline(0, 30, closed=False), kline(1, 120, closed=True)]
    received = replayed([capture("frames", frames)])
    assert received.times == sorted(received.times)
    assert len(received.updates) == 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"wss://x/stream <-> 1626992740.1\n", "no klines of Binance in it"),
        (b"wss://x/stream <-> 1626992740.1\n1626992741: {}\n", "no klines of Binance in it"),
        (b"wss://x/stream <-> 1626992740.1\nwhat\n", "line 2: expected 'epoch seconds: frame'"),
        (
            gzip.compress(b"wss://x/stream <-> 1626992740.1\n1626992741: {}\n", mtime=0)[:-4],
            "not readable",
        ),
    ],
)
def test_broken_capture_raises(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "frames.gz"
    path.write_bytes(content)
    with pytest.raises(CandleFileError, match=f"frames.gz: {reason}"):
        Recording.read([str(path)])


def test_files_that_do_not_fit_together_raise(write: Write, capture: Write) -> None:
    a, b = write("A_B.csv"), write("A_B-1m.csv")
    with pytest.raises(
        CandleFileError, match=r"A_B-1m.csv: [^ ]*A_B.csv has the same series, replay:A/B:1m"
    ):
        Recording.read([a, b])
    with pytest.raises(CandleFileError, match=r"a replay has one venue.*binance, replay"):
        Recording.read([a, f"binance:C/D={b}"])
    with pytest.raises(CandleFileError, match="no such file"):
        Recording.read(["nothing.csv"])
    with pytest.raises(CandleFileError, match="name it: SERIES="):
        Recording.read([f":={a}"])
    frames = capture("frames", [kline(0, 60, closed=True)])
    with pytest.raises(CandleFileError, match="its frames name the series"):
        Recording.read([f"A/B={frames}"])


def test_traits_differ_for_candles_and_captures(write: Write, capture: Write) -> None:
    files = Recording.read([write("A_B.csv", 5)])
    assert files.traits == Traits(grace_seconds=0, history_lag_seconds=0)
    frames = Recording.read([capture("frames", [kline(0, 60, closed=True)])])
    assert frames.traits == Traits(fills_empty=True)
