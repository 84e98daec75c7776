"""Candle files: formats, spellings of columns and times, and error messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kronos_stream.market.candle_files import CandleFileError, read_candles
from kronos_stream.market.spacing import find_gaps, infer_timeframe
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.utc import parse_time, rfc3339

_START = 1_718_709_300_000  # 2024-06-18T11:15:00Z
_STEP = 300_000


def _frame(bars: int = 20) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    close = 100 * np.exp(rng.normal(0, 0.01, bars).cumsum())
    opened = np.r_[100.0, close[:-1]]
    return pd.DataFrame(
        {
            "timestamp": _START + _STEP * np.arange(bars),
            "open": opened,
            "high": np.maximum(opened, close) * 1.001,
            "low": np.minimum(opened, close) * 0.999,
            "close": close,
            "volume": rng.uniform(1, 10, bars),
            "amount": rng.uniform(100, 1000, bars),
        }
    )


def _write(frame: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".feather":
        frame.to_feather(path)
    elif path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as out:
            out.write(frame.to_csv(index=False).encode())
    else:
        frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize(
    "name",
    ["a.csv", "a.CSV", "a.csv.gz", "a.csv.zst", "a.csv.bz2", "a.csv.zip", "a.parquet", "a.feather"],
)
def test_all_formats_give_the_same_candles(tmp_path: Path, name: str) -> None:
    frame = _frame()
    table = read_candles(_write(frame, tmp_path / name))
    assert table.times.dtype == np.int64
    assert np.array_equal(table.times, frame["timestamp"])
    assert np.array_equal(table.values, frame.iloc[:, 1:].to_numpy())
    assert (str(table.timeframe), table.has_volume, table.has_amount) == ("5m", True, True)
    assert (len(table), table.gaps, table.path) == (20, [], tmp_path / name)


@pytest.mark.parametrize(
    "names",
    [
        ["Timestamps", "Open", "High", "Low", "Close", "Vol", "Turnover"],
        ["open_time", "OPEN", "HIGH", "LOW", "CLOSE", "VOLUME", "Quote Volume"],
        [" date", "o", "h", "l", "c", "v", "quote_asset_volume"],
    ],
)
def test_column_aliases(tmp_path: Path, names: list[str]) -> None:
    frame = _frame()
    table = read_candles(_write(frame.set_axis(names, axis=1), tmp_path / "a.csv"))
    assert np.array_equal(table.values, frame.iloc[:, 1:].to_numpy())


_SPELLINGS: dict[str, Callable[[pd.Series], pd.Series]] = {
    "seconds": lambda t: t // 1000,
    "float seconds": lambda t: t / 1000,
    "milliseconds": lambda t: t,
    "microseconds": lambda t: t * 1000,
    "nanoseconds": lambda t: t * 1_000_000,
    "changed from ms to us": lambda t: t.where(t.index < 10, t * 1000),
    "text milliseconds": lambda t: t.astype(str),
    "naive text": lambda t: pd.to_datetime(t, unit="ms").astype(str),
    "zoned text": lambda t: (
        pd.to_datetime(t, unit="ms", utc=True).dt.tz_convert("Asia/Shanghai").map(str)
    ),
    "slashes": lambda t: pd.to_datetime(t, unit="ms").dt.strftime("%Y/%m/%d %H:%M"),
    "typed": lambda t: pd.to_datetime(t, unit="ms"),
    "typed, zoned": lambda t: pd.to_datetime(t, unit="ms", utc=True).dt.tz_convert("US/Eastern"),
}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("spelling", _SPELLINGS)
def test_time_formats(tmp_path: Path, spelling: str, suffix: str) -> None:
    frame = _frame()
    expected = frame["timestamp"].to_numpy()
    frame["timestamp"] = _SPELLINGS[spelling](frame["timestamp"])
    assert np.array_equal(read_candles(_write(frame, tmp_path / f"a{suffix}")).times, expected)


def test_times_in_a_stored_index(tmp_path: Path) -> None:
    frame = _frame()
    expected = frame["timestamp"].to_numpy()
    frame.index = pd.DatetimeIndex(pd.to_datetime(frame.pop("timestamp"), unit="ms"), name=None)
    assert np.array_equal(read_candles(_write(frame, tmp_path / "a.parquet")).times, expected)


def test_exchange_dump_without_a_header(tmp_path: Path) -> None:
    frame = _frame()
    dump = frame.assign(close_time=frame["timestamp"] + _STEP - 1, trades=3, tb=1.0, tq=2.0, x=0)
    order = ["timestamp", "open", "high", "low", "close", "volume", "close_time", "amount"]
    path = tmp_path / "BTCUSDT-5m-2024-06.csv"
    dump[[*order, "trades", "tb", "tq", "x"]].to_csv(path, index=False, header=False)
    table = read_candles(path)
    assert np.array_equal(table.values, frame.iloc[:, 1:].to_numpy())


def test_prices_as_text_and_decimals_as_written(tmp_path: Path) -> None:
    frame = _frame()
    table = read_candles(
        _write(frame.astype({"close": str, "volume": str}), tmp_path / "a.parquet")
    )
    assert np.array_equal(table.values, frame.iloc[:, 1:].to_numpy())


def test_missing_amount_is_derived(tmp_path: Path) -> None:
    frame = _frame()
    table = read_candles(_write(frame.drop(columns="amount"), tmp_path / "a.csv"))
    mean = frame[["open", "high", "low", "close"]].mean(axis=1)
    amount = table.values[:, 5]  # noqa: PD011
    assert np.allclose(amount, frame["volume"] * mean, rtol=1e-14)
    assert (table.has_volume, table.has_amount) == (True, False)


@pytest.mark.parametrize("missing", [["volume"], ["volume", "amount"]])
def test_without_volume_volume_and_amount_are_zero(tmp_path: Path, missing: list[str]) -> None:
    table = read_candles(_write(_frame().drop(columns=missing), tmp_path / "a.csv"))
    assert not np.any(table.values[:, 4:])  # noqa: PD011
    assert (table.has_volume, table.has_amount) == (False, False)


def test_gaps_are_listed_and_allowed(tmp_path: Path) -> None:
    table = read_candles(_write(_frame().drop(index=[3, 7, 8, 9]), tmp_path / "a.csv"))
    assert table.gaps == [(_START + 2 * _STEP, 1), (_START + 6 * _STEP, 3)]
    assert str(table.timeframe) == "5m"


@given(st.sets(st.integers(0, 300), min_size=2), st.sampled_from(["1s", "5m", "1d", "1w", "1M"]))
def test_gaps_and_bars_add_up_to_the_whole_span(kept: set[int], text: str) -> None:
    timeframe = Timeframe.parse(text)
    times = np.array([timeframe.after(_START, k) for k in sorted(kept)])
    missing = sum(bars for _, bars in find_gaps(times, timeframe))
    assert missing + len(kept) == max(kept) - min(kept) + 1


@pytest.mark.parametrize("text", ["1s", "15s", "1m", "3m", "4h", "1d", "3d", "1w", "1M", "3M"])
@pytest.mark.parametrize("start", ["2023-12-31T16:00", "2024-01-01", "2024-02-01"])
def test_timeframe_is_inferred(text: str, start: str) -> None:
    timeframe = Timeframe.parse(text)
    times = [timeframe.after(parse_time(start), k) for k in range(30)]
    assert infer_timeframe(np.array(times)) == timeframe
    assert infer_timeframe(np.array(times[:9] + times[11:])) == timeframe


def _with(
    column: str, row: int, value: str | float | None
) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        values = frame[column].tolist()
        return frame.assign(**{column: [*values[:row], value, *values[row + 1 :]]})

    return change


_BAR_4 = r"row 4 \(2024-06-18T11:30:00Z\): "
_FAULTS: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "missing columns": (
        lambda f: f.drop(columns=["high", "timestamp"]),
        "missing columns time, high; found: open, low, close, volume, amount",
    ),
    "no candles": (lambda f: f.iloc[:0], "no candles in it"),
    "one bar": (lambda f: f.iloc[:1], "only one bar.*give --timeframe"),
    "backwards": (lambda f: f.iloc[::-1], "row 2 .*earlier than the row before; sort"),
    "twice": (lambda f: f.iloc[[0, 1, 2, 2, 3]], r"row 4 \(2024-06-18T11:25:00Z\): the same time"),
    "missing price": (_with("close", 3, None), _BAR_4 + "close is missing"),
    "infinite": (_with("volume", 3, "inf"), _BAR_4 + "volume is inf, not a finite number"),
    "text": (_with("open", 3, "n.a. today"), _BAR_4 + "open is n.a. today, not a finite"),
    "high < low": (_with("low", 3, 1e6), _BAR_4 + "impossible candle, high < low"),
    "high < close": (_with("close", 3, 1e6), _BAR_4 + "impossible candle, high < open or close"),
    "low > open": (_with("open", 3, 1e-6), _BAR_4 + "impossible candle, low > open or close"),
    "volume < 0": (_with("volume", 3, -1.0), _BAR_4 + "impossible candle, volume < 0"),
    "no time": (_with("timestamp", 3, None), "row 4: nan is not a time"),
    "word as time": (_with("timestamp", 3, "yesterday"), "row 4: .* is not a time; expected epoch"),
    "row numbers as time": (
        lambda f: f.assign(timestamp=range(len(f))),
        "row 1: 0 is not a time; expected epoch",
    ),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_invalid_candles_are_rejected_in_one_line(tmp_path: Path, fault: str) -> None:
    change, message = _FAULTS[fault]
    path = _write(change(_frame()), tmp_path / "a.csv")
    with pytest.raises(CandleFileError, match=message) as caught:
        read_candles(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"1,2,3\n4,5,6\n", "the first row holds numbers; add a header"),
        ("a.parquet", b"not parquet", "not readable"),
        ("a.csv.gz", b"not gzip", "not readable"),
        ("a.xlsx", b"", "unknown kind of file"),
        ("candles", b"", "unknown kind of file"),
    ],
)
def test_unreadable_files_are_rejected_in_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CandleFileError, match=message) as caught:
        read_candles(path)
    assert "\n" not in str(caught.value)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CandleFileError, match="no such file"):
        read_candles(tmp_path / "none.csv")


def test_given_timeframe_is_used_unless_bars_are_closer(tmp_path: Path) -> None:
    path = _write(_frame(), tmp_path / "a.csv")
    assert len(read_candles(path, Timeframe.parse("1m")).gaps) == 19
    with pytest.raises(CandleFileError, match="mostly 300 s apart, closer than 1h bars"):
        read_candles(path, Timeframe.parse("1h"))


@settings(max_examples=200)
@given(st.integers(-(10**12), 10**13))
def test_times_are_equal_after_formatting_and_parsing(time_ms: int) -> None:
    assert parse_time(rfc3339(time_ms)) == time_ms


@pytest.mark.parametrize("text", ["", "yesterday", "1718709300000", "2024-13-01"])
def test_invalid_times_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="expected ISO 8601"):
        parse_time(text)
