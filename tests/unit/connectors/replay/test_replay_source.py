"""The replay source: which series a file is, what is known when, and how time passes."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kronos_connectors.replay import CONNECTOR
from kronos_connectors.replay.candles import symbol_of
from kronos_connectors.replay.recordings import FileSpec
from kronos_connectors.replay.replay_clock import PacedClock, driven_advance, paced_advance
from kronos_connectors.replay.source import Recording, ReplaySource
from kronos_stream.interfaces.source import SourceCallbacks, SourceError, Traits
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.candle_files import CandleFileError
from kronos_stream.market.clock import Clock, LoopClock, ManualClock
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.testing.market import START_MS, Market
from kronos_stream.testing.virtual_time import run_virtual

MINUTE = 60_000
BTC = Series.parse("binance:BTC/USDT:1m")
PERPETUAL = Series.parse("binance:BTC/USDT:USDT:1m")

Write = Callable[..., str]


class RecordingCallbacks:
    """An intake that keeps what it is told, and when that was."""

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


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes ``bars`` generated bars to a CSV file, without those numbered in ``without``."""

    def write(
        name: str,
        bars: int = 20,
        *,
        timeframe: int = MINUTE,
        start: int = START_MS,
        without: Sequence[int] = (),
        amount: bool = True,
    ) -> str:
        candles = Market(1, timeframe, seed=3, start_ms=start).run(bars)
        rows = candles.values  # noqa: PD011 - an array, no pandas object's
        kept = np.setdiff1d(np.arange(bars), without)
        columns = ["open", "high", "low", "close", "volume", "amount"]
        frame = pd.DataFrame(rows[kept, 0], columns=columns)
        frame.insert(0, "time", candles.times[kept])
        path = tmp_path / name
        frame[frame.columns[: None if amount else -1]].to_csv(path, index=False)
        return str(path)

    return write


@pytest.fixture
def capture(tmp_path: Path) -> Write:
    """Writes frames, each after its time in s, as a recorder does."""

    def capture(
        name: str,
        frames: Sequence[tuple[float, str]],
        url: str = "wss://data-stream.binance.vision/stream?streams=btcusdt@kline_1m",
    ) -> str:
        head = f"{url} <-> {START_MS / 1000}\n"
        text = head + "".join(f"{received}: {frame}\n" for received, frame in frames)
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return str(path)

    return capture


def kline(bar: int, event: float, price: str = "7", *, closed: bool) -> tuple[float, str]:
    """A frame of the ``bar``-th minute, sent ``event`` s after the start; heard 0.1 s later."""
    opened = START_MS + bar * MINUTE
    told = {"t": opened, "T": opened + MINUTE - 1, "s": "BTCUSDT", "i": "1m", "x": closed}
    told |= {"o": price, "c": price, "h": price, "l": price, "v": "2", "q": "14"}
    sent = START_MS + round(event * 1000)
    data = {"e": "kline", "E": sent, "s": "BTCUSDT", "k": told}
    return sent / 1000 + 0.1, json.dumps({"stream": "btcusdt@kline_1m", "data": data})


async def _settled() -> None:
    await asyncio.sleep(0)


def replayed(
    files: Sequence[str], start: int | None = None, *, lookback: int = 1, **options: Any
) -> RecordingCallbacks:
    """What the daemon hears when ``files`` are replayed as fast as possible."""
    recording = Recording.read(files)
    start = recording.start(lookback) if start is None else start
    clock = ManualClock(start)
    heard = RecordingCallbacks(clock)
    source = ReplaySource(
        recording, clock, start, advance_to=driven_advance(clock, _settled, lambda: None), **options
    )
    source.subscribe(recording.series)
    asyncio.run(source.run(heard.callbacks))
    return heard


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
def test_a_files_name_gives_the_symbol(name: str, symbol: str) -> None:
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
def test_a_series_may_be_said(text: str, venue: str, symbol: str, timeframe: str | None) -> None:
    wanted = FileSpec.parse(text)
    expected = FileSpec(Path("a.csv"), venue, symbol, timeframe and Timeframe.parse(timeframe))  # type: ignore[arg-type]
    assert wanted == expected


def test_a_name_with_an_equals_sign_is_a_file_if_there_is_one(write: Write) -> None:
    path = write("ETH_BTC=5m.csv")
    assert FileSpec.parse(path) == FileSpec(Path(path))


def test_bars_of_all_series_come_at_their_closes_in_order(write: Write) -> None:
    files = [write("A_B-1m.csv", 30), write("C_D.csv", 6, timeframe=5 * MINUTE)]
    heard = replayed(files)
    closes = [one.series.timeframe.after(one.candle.time) for one in heard.updates]
    assert closes == sorted(closes) == heard.times == [one.received for one in heard.updates]
    assert all(one.closed for one in heard.updates)
    counts = {name: sum(one.series.name == name for one in heard.updates) for name in NAMES}
    assert counts == {"replay:A/B:1m": 30, "replay:C/D:5m": 6}


NAMES = ("replay:A/B:1m", "replay:C/D:5m")


def test_what_is_told_is_what_the_file_says(write: Write) -> None:
    path = write("A_B.csv", 5)
    table = pd.read_csv(path)
    told = [one.candle for one in replayed([path]).updates]
    assert told == [Candle(int(row[0]), *row[1:]) for row in table.itertuples(index=False)]


def test_an_amount_that_the_file_lacks_is_not_made_up(write: Write) -> None:
    heard = replayed([write("A_B.csv", 5, amount=False)])
    assert [one.candle.amount for one in heard.updates] == [None] * 5


def test_the_first_bar_pushed_completes_the_lookback_over_a_hole(write: Write) -> None:
    files = [write("A_B.csv", 30, without=[4, 5])]
    heard = replayed(files, lookback=10)
    assert heard.updates[0].candle.time == START_MS + 9 * MINUTE
    assert len(heard.updates) == Recording.read(files).count(START_MS + 9 * MINUTE) == 21


def test_history_never_holds_a_bar_that_is_open_nor_one_the_file_lacks(write: Write) -> None:
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


def test_months_close_when_the_calendar_says(tmp_path: Path) -> None:
    path = tmp_path / "A_B.csv"
    path.write_text(
        "time,open,high,low,close\n"
        + "".join(f"2024-{month:02d}-01,1,1,1,1\n" for month in range(1, 8))
    )
    heard = replayed([str(path)])
    months = pd.to_datetime(heard.times, unit="ms").strftime("%m-%d").tolist()
    assert months == [f"{month:02d}-01" for month in range(2, 9)]


def test_it_ends_after_so_many_closes(write: Write) -> None:
    files = [write("A_B.csv"), write("C_D.csv")]
    assert len(replayed(files, max_closes=4).updates) == 8


def test_only_what_is_followed_is_pushed(write: Write) -> None:
    recording = Recording.read([write("A_B.csv"), write("C_D.csv")])
    clock = ManualClock(START_MS)
    heard = RecordingCallbacks(clock)
    source = ReplaySource(
        recording, clock, START_MS, advance_to=driven_advance(clock, _settled, lambda: None)
    )
    source.subscribe([Series.parse("replay:C/D:1m")])
    asyncio.run(source.run(heard.callbacks))
    assert {one.series.symbol for one in heard.updates} == {"C/D"}


def test_a_series_that_is_not_recorded_is_unknown(write: Write) -> None:
    source = ReplaySource(Recording.read([write("A_B.csv")]), ManualClock(0), 0)
    found = asyncio.run(source.unsupported([Series.parse("replay:A/B:1m"), BTC]))
    assert found == {BTC: "not recorded; there are replay:A/B:1m"}


def test_time_stops_at_alarms_and_goes_on_only_from_what_is_settled(write: Write) -> None:
    """A bar every two minutes, and somebody who wants to be woken every twenty seconds."""
    recording = Recording.read([write("A_B.csv", 3, timeframe=2 * MINUTE)])
    clock = ManualClock(START_MS)
    heard = RecordingCallbacks(clock)
    settled: list[int] = []

    async def settle() -> None:
        await asyncio.sleep(0)
        settled.append((clock.now() - START_MS) // 1000)

    def alarm() -> int:
        return START_MS + (settled[-1] // 20 + 1) * 20_000

    source = ReplaySource(
        recording, clock, START_MS, advance_to=driven_advance(clock, settle, alarm)
    )
    source.subscribe(recording.series)
    asyncio.run(source.run(heard.callbacks))
    assert heard.times == [START_MS + bar * 2 * MINUTE for bar in (1, 2, 3)]
    assert settled == list(range(0, 360, 20))


@pytest.mark.parametrize("speed", [1.0, 60.0])
def test_at_a_speed_bars_come_when_their_time_has_come(write: Write, speed: float) -> None:
    """A daemon that takes ten seconds to start has missed nothing."""

    async def main() -> list[float]:
        recording = Recording.read([write("A_B.csv", 5)])
        clock = PacedClock(START_MS, speed)
        heard = RecordingCallbacks(clock)
        source = ReplaySource(recording, clock, START_MS, advance_to=paced_advance(clock, _settled))
        source.subscribe(recording.series)
        await asyncio.sleep(10)
        assert clock.now() == START_MS
        began = asyncio.get_running_loop().time()
        waited = asyncio.create_task(clock.sleep(90))
        await source.run(heard.callbacks)
        assert waited.done()
        assert heard.times == [START_MS + (bar + 1) * MINUTE for bar in range(5)]
        return [began, asyncio.get_running_loop().time()]

    began, ended = run_virtual(main())
    assert ended - began == pytest.approx(300 / speed, abs=0.01)


def test_frames_are_decoded_as_live_ones_and_heard_when_they_were(capture: Write) -> None:
    frames = [
        kline(0, 58, "7.0", closed=False),
        (START_MS / 1000 + 59, '{"stream":"btcusdt@trade","data":{"e":"trade","p":"7"}}'),
        kline(0, 60.2, "7.1", closed=True),
        (START_MS / 1000 + 61, "no JSON at all"),
        kline(1, 62, "7.2", closed=False),
        kline(1, 120.1, "7.3", closed=True),
    ]
    heard = replayed([capture("frames.gz", frames)])
    bars = [(START_MS + MINUTE * (i // 2), bool(i % 2)) for i in range(4)]
    assert [(one.candle.time, one.closed) for one in heard.updates] == bars
    assert [one.candle.close for one in heard.updates] == [7.0, 7.1, 7.2, 7.3]
    assert {one.series for one in heard.updates} == {BTC}
    seconds = [(time - START_MS) / 1000 for time in heard.times]
    assert seconds == [58.1, 60.3, 62.1, 120.2]
    ((series, reason, raw),) = heard.rejected
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
def test_the_connection_says_which_market_it_is(capture: Write, url: str, series: Series) -> None:
    path = capture("frames", [kline(0, 60, closed=True)], url)
    assert Recording.read([path]).series == {series}


def test_history_of_a_capture_is_what_was_heard_to_close(capture: Write) -> None:
    frames = [kline(bar, bar * 60 + 60, str(bar + 1), closed=True) for bar in range(3)]
    frames.insert(1, kline(1, 90, "9", closed=False))
    recording = Recording.read([capture("frames", frames)])
    known = recording.history(BTC, START_MS, START_MS + 10 * MINUTE, START_MS + 120_100)
    assert [candle.close for candle in known] == [1.0, 2.0]
    assert recording.count(START_MS + 60_100) == 2
    early = recording.history(BTC, START_MS, START_MS + 10 * MINUTE, START_MS + 120_099)
    assert [candle.close for candle in early] == [1.0]


def test_candles_lead_up_to_a_capture_of_the_same_series(write: Write, capture: Write) -> None:
    path = "binance:BTC/USDT=" + write("b.csv", 20, start=START_MS - 10 * MINUTE)
    frames = [kline(bar, bar * 60 + 60, closed=True) for bar in range(5)]
    closed = replayed([path, capture("frames", [kline(0, 30, closed=False), *frames])]).updates
    assert closed.pop(10).closed is False
    assert [one.candle.time for one in closed] == [START_MS + bar * MINUTE for bar in range(-10, 5)]
    assert [one.candle.close == 7.0 for one in closed] == [False] * 10 + [True] * 5


def test_a_recorders_clock_set_back_does_not_set_time_back(capture: Write) -> None:
    frames = [kline(0, 60, closed=True), kline(0, 30, closed=False), kline(1, 120, closed=True)]
    heard = replayed([capture("frames", frames)])
    assert heard.times == sorted(heard.times)
    assert len(heard.updates) == 3


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
def test_a_broken_capture_is_one_clear_line(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "frames.gz"
    path.write_bytes(content)
    with pytest.raises(CandleFileError, match=f"frames.gz: {reason}"):
        Recording.read([str(path)])


def test_files_that_do_not_fit_together_are_one_clear_line(write: Write, capture: Write) -> None:
    a, b = write("A_B.csv"), write("A_B-1m.csv")
    with pytest.raises(CandleFileError, match=r"A_B-1m.csv: its series is replay:A/B:1m, as is"):
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


def test_in_a_daemon_on_the_wall_clock_the_bars_happen_now(write: Write) -> None:
    options = CONNECTOR.options(files=(write("A_B.csv", 20),), history=10)

    async def main() -> None:
        now = START_MS + 1_000_000 * MINUTE + 12_345
        clock = LoopClock(now)
        heard = RecordingCallbacks(clock)
        source = CONNECTOR.build("replay", options, clock, random.Random(0))
        series = Series.parse("replay:A/B:1m")
        source.subscribe([series])
        known = await source.history(series, 0, now + MINUTE)
        assert len(known) == 10
        assert known[-1].time == now // MINUTE * MINUTE - MINUTE
        await source.run(heard.callbacks)
        assert [one.candle.time for one in heard.updates] == [
            now // MINUTE * MINUTE + bar * MINUTE for bar in range(10)
        ]
        assert heard.times == [one.received for one in heard.updates]

    run_virtual(main())


def test_after_its_end_a_recording_knows_nothing(write: Write) -> None:
    recording = Recording.read([write("A_B.csv", 5), write("C_D.csv", 9)])
    ended, other = sorted(recording.series, key=lambda one: one.name)
    end = START_MS + 5 * MINUTE
    source = ReplaySource(recording, ManualClock(START_MS + 9 * MINUTE), START_MS)
    assert len(asyncio.run(source.history(ended, end - MINUTE, end + MINUTE))) == 1
    assert len(asyncio.run(source.history(other, end, end + MINUTE))) == 1
    with pytest.raises(SourceError, match="its recording has ended") as raised:
        asyncio.run(source.history(ended, end, end + MINUTE))
    assert raised.value.retry_after > 1e8


def test_files_are_complete_at_once_and_frames_are_not(write: Write, capture: Write) -> None:
    files = Recording.read([write("A_B.csv", 5)])
    assert files.traits == Traits(grace_seconds=0, history_lag_seconds=0)
    frames = Recording.read([capture("frames", [kline(0, 60, closed=True)])])
    assert frames.traits == Traits(fills_empty=True)
