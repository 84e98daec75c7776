"""Replay of candle files: their series, history and time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from kronos_connectors.replay import CONNECTOR
from kronos_connectors.replay.candles import symbol_of
from kronos_connectors.replay.recordings import FileSpec
from kronos_connectors.replay.replay_clock import PacedClock, driven_advance, paced_advance
from kronos_connectors.replay.source import Recording, ReplaySource
from kronos_stream.interfaces.source import SourceError
from kronos_stream.market.candle import Candle
from kronos_stream.market.clock import LoopClock, ManualClock
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.testing.market import START_MS
from tests.support.recordings import (
    BTC,
    MINUTE,
    RecordingCallbacks,
    replayed,
    write_candles,
    yield_once,
)

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return partial(write_candles, tmp_path)


@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("ETH_BTC-5m.csv.gz", "ETH/BTC"),
        ("BTC_USDT_USDT-1h.feather", "BTC/USDT:USDT"),
        ("BTCUSDT-1m-2024-01.zip", "BTCUSDT"),
        ("BTC-USD.parquet", "BTC-USD"),
        ("my.series.csv", "my.series"),
    ],
)
def test_symbol_is_parsed_from_the_file_name(name: str, symbol: str) -> None:
    assert symbol_of(Path("some_folder") / name) == symbol


@pytest.mark.parametrize(
    ("text", "venue", "symbol", "timeframe"),
    [
        ("a.csv", "", "", None),
        ("ETH/BTC=a.csv", "replay", "ETH/BTC", None),
        ("ETH/BTC:5m=a.csv", "replay", "ETH/BTC", "5m"),
        ("binance:ETH/BTC=a.csv", "binance", "ETH/BTC", None),
        ("BTC/USDT:USDT=a.csv", "replay", "BTC/USDT:USDT", None),
        ("binance:BTC/USDT:USDT:1M=a.csv", "binance", "BTC/USDT:USDT", "1M"),
    ],
)
def test_file_spec_is_parsed(text: str, venue: str, symbol: str, timeframe: str | None) -> None:
    wanted = FileSpec.parse(text)
    expected = FileSpec(Path("a.csv"), venue, symbol, timeframe and Timeframe.parse(timeframe))  # type: ignore[arg-type]
    assert wanted == expected


def test_existing_file_with_an_equals_sign_is_a_file(write: Write) -> None:
    path = write("ETH_BTC=5m.csv")
    assert FileSpec.parse(path) == FileSpec(Path(path))


def test_bars_of_all_series_arrive_at_their_closes_in_order(write: Write) -> None:
    files = [write("A_B-1m.csv", 30), write("C_D.csv", 6, timeframe=5 * MINUTE)]
    received = replayed(files)
    closes = [one.series.timeframe.after(one.candle.time) for one in received.updates]
    assert closes == sorted(closes) == received.times == [one.received for one in received.updates]
    assert all(one.closed for one in received.updates)
    counts = {name: sum(one.series.name == name for one in received.updates) for name in NAMES}
    assert counts == {"replay:A/B:1m": 30, "replay:C/D:5m": 6}


NAMES = ("replay:A/B:1m", "replay:C/D:5m")


def test_candles_equal_those_of_the_file(write: Write) -> None:
    path = write("A_B.csv", 5)
    table = pd.read_csv(path)
    candles = [one.candle for one in replayed([path]).updates]
    assert candles == [Candle(int(row[0]), *row[1:]) for row in table.itertuples(index=False)]


def test_missing_amounts_stay_none(write: Write) -> None:
    received = replayed([write("A_B.csv", 5, amount=False)])
    assert [one.candle.amount for one in received.updates] == [None] * 5


def test_first_pushed_bar_completes_the_lookback_over_a_gap(write: Write) -> None:
    files = [write("A_B.csv", 30, without=[4, 5])]
    received = replayed(files, lookback=10)
    assert received.updates[0].candle.time == START_MS + 9 * MINUTE
    assert len(received.updates) == Recording.read(files).count(START_MS + 9 * MINUTE) == 21


def test_history_has_closed_bars_of_the_file_only(write: Write) -> None:
    recording = Recording.read([write("A_B.csv", 20, without=[7])])
    (series,) = recording.series
    clock = ManualClock(START_MS)
    source = ReplaySource(recording, clock, START_MS)

    async def bars(moment: int, start: int, end: int) -> list[int]:
        clock.advance(START_MS + moment)
        found = await source.history(series, START_MS + start * MINUTE, START_MS + end * MINUTE)
        return [(candle.time - START_MS) // MINUTE for candle in found]

    async def main() -> None:
        assert await bars(0, 0, 20) == []
        assert await bars(10 * MINUTE - 1, 5, 20) == [5, 6, 8]
        assert await bars(10 * MINUTE, 5, 20) == [5, 6, 8, 9]
        assert await bars(10 * MINUTE, 5, 7) == [5, 6]
        assert await bars(10 * MINUTE, 7, 8) == []

    asyncio.run(main())


def test_months_close_by_the_calendar(tmp_path: Path) -> None:
    path = tmp_path / "A_B.csv"
    path.write_text(
        "time,open,high,low,close\n"
        + "".join(f"2024-{month:02d}-01,1,1,1,1\n" for month in range(1, 8))
    )
    received = replayed([str(path)])
    months = pd.to_datetime(received.times, unit="ms").strftime("%m-%d").tolist()
    assert months == [f"{month:02d}-01" for month in range(2, 9)]


def test_replay_ends_after_max_closes(write: Write) -> None:
    files = [write("A_B.csv"), write("C_D.csv")]
    assert len(replayed(files, max_closes=4).updates) == 8


def test_only_subscribed_series_are_pushed(write: Write) -> None:
    recording = Recording.read([write("A_B.csv"), write("C_D.csv")])
    clock = ManualClock(START_MS)
    received = RecordingCallbacks(clock)
    source = ReplaySource(
        recording, clock, START_MS, advance_to=driven_advance(clock, yield_once, lambda: None)
    )
    source.subscribe([Series.parse("replay:C/D:1m")])
    asyncio.run(source.run(received.callbacks))
    assert {one.series.symbol for one in received.updates} == {"C/D"}


def test_series_without_recording_is_unsupported(write: Write) -> None:
    source = ReplaySource(Recording.read([write("A_B.csv")]), ManualClock(0), 0)
    found = asyncio.run(source.unsupported([Series.parse("replay:A/B:1m"), BTC]))
    assert found == {BTC: "not recorded; there are replay:A/B:1m"}


def test_driven_time_stops_at_timers_and_waits_until_idle(write: Write) -> None:
    """A bar every two minutes, and a timer every twenty seconds."""
    recording = Recording.read([write("A_B.csv", 3, timeframe=2 * MINUTE)])
    clock = ManualClock(START_MS)
    received = RecordingCallbacks(clock)
    idle_at: list[int] = []

    async def wait_until_idle() -> None:
        await asyncio.sleep(0)
        idle_at.append((clock.now() - START_MS) // 1000)

    def next_timer() -> int:
        return START_MS + (idle_at[-1] // 20 + 1) * 20_000

    source = ReplaySource(
        recording, clock, START_MS, advance_to=driven_advance(clock, wait_until_idle, next_timer)
    )
    source.subscribe(recording.series)
    asyncio.run(source.run(received.callbacks))
    assert received.times == [START_MS + bar * 2 * MINUTE for bar in (1, 2, 3)]
    assert idle_at == list(range(0, 360, 20))


@pytest.mark.virtual_time
@pytest.mark.parametrize("speed", [1.0, 60.0])
async def test_paced_time_runs_at_the_given_speed(write: Write, speed: float) -> None:
    """A daemon that takes ten seconds to start misses no bar."""
    recording = Recording.read([write("A_B.csv", 5)])
    clock = PacedClock(START_MS, speed)
    received = RecordingCallbacks(clock)
    source = ReplaySource(recording, clock, START_MS, advance_to=paced_advance(clock, yield_once))
    source.subscribe(recording.series)
    await asyncio.sleep(10)
    assert clock.now() == START_MS
    began = asyncio.get_running_loop().time()
    waited = asyncio.create_task(clock.sleep(90))
    await source.run(received.callbacks)
    assert waited.done()
    assert received.times == [START_MS + (bar + 1) * MINUTE for bar in range(5)]
    began, ended = [began, asyncio.get_running_loop().time()]
    assert ended - began == pytest.approx(300 / speed, abs=0.01)


@pytest.mark.virtual_time
async def test_source_of_the_daemon_moves_bars_to_the_present(write: Write) -> None:
    options = CONNECTOR.options(files=(write("A_B.csv", 20),), history=10)

    now = START_MS + 1_000_000 * MINUTE + 12_345
    clock = LoopClock(now)
    received = RecordingCallbacks(clock)
    source = CONNECTOR.build("replay", options, clock, random.Random(0))
    series = Series.parse("replay:A/B:1m")
    source.subscribe([series])
    known = await source.history(series, 0, now + MINUTE)
    assert len(known) == 10
    assert known[-1].time == now // MINUTE * MINUTE - MINUTE
    await source.run(received.callbacks)
    assert [one.candle.time for one in received.updates] == [
        now // MINUTE * MINUTE + bar * MINUTE for bar in range(10)
    ]
    assert received.times == [one.received for one in received.updates]


def test_history_after_the_end_of_a_recording_raises(write: Write) -> None:
    recording = Recording.read([write("A_B.csv", 5), write("C_D.csv", 9)])
    ended, other = sorted(recording.series, key=lambda one: one.name)
    end = START_MS + 5 * MINUTE
    source = ReplaySource(recording, ManualClock(START_MS + 9 * MINUTE), START_MS)
    assert len(asyncio.run(source.history(ended, end - MINUTE, end + MINUTE))) == 1
    assert len(asyncio.run(source.history(other, end, end + MINUTE))) == 1
    with pytest.raises(SourceError, match="its recording has ended") as raised:
        asyncio.run(source.history(ended, end, end + MINUTE))
    assert raised.value.retry_after > 1e8
