"""Training windows: no gaps, separate parts, and no information about the future."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kronos_stream.market.candle_files import CandleFileError
from kronos_stream.model.inputs import time_stamps
from kronos_stream.testing.market import START_MS, Market
from kronos_stream.training.dataset import CandleDataset, FileWindows, Split
from kronos_stream.training.errors import TrainingError
from kronos_stream.training.generated import GeneratedWindows
from kronos_stream.training.windows import make_batch, normalise

MINUTE = 60_000
WINDOW = 8


def frame(times: NDArray[np.int64], seed: int = 0) -> pd.DataFrame:
    """Return candles at ``times``."""
    values = Market(1, MINUTE, seed=seed).run(len(times)).values[:, 0]
    columns = ["open", "high", "low", "close", "volume", "amount"]
    return pd.DataFrame(values, columns=columns).assign(timestamp=times)


def all_windows(source: FileWindows | None) -> NDArray[np.int64]:
    """Return the times (N, S) of every window of a source."""
    if source is None:
        return np.empty((0, WINDOW), np.int64)
    return source.gather(np.arange(len(source))).times


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.lists(st.sampled_from([1, 1, 1, 1, 1, 1, 1, 1, 2, 7]), min_size=120, max_size=200),
        min_size=1,
        max_size=3,
    ),
    valid_share=st.sampled_from([0.0, 0.1, 0.3]),
)
def test_no_window_contains_a_gap_or_overlaps_another_part(
    tmp_path_factory: pytest.TempPathFactory, steps: list[list[int]], valid_share: float
) -> None:
    folder = tmp_path_factory.mktemp("gaps")
    expected = 0
    for i, jumps in enumerate(steps):
        times = START_MS + MINUTE * np.cumsum([10 * i, *jumps])
        frame(times, i).to_csv(folder / f"{i}.csv", index=False)
        runs = np.split(times, np.flatnonzero(np.diff(times) > MINUTE) + 1)
        expected += sum(max(0, len(run) - WINDOW + 1) for run in runs)
    try:
        dataset = CandleDataset.prepare(
            [folder], folder / "store", WINDOW, valid_share=valid_share, test_share=0.2
        )
    except TrainingError:
        return  # no segment is long enough for a window
    parts: list[Split] = ["train", "valid", "test"]
    windows = [all_windows(dataset.source(part, 0)) for part in parts]
    for times in windows:
        assert (np.diff(times, axis=1) == MINUTE).all()
    assert sum(map(len, windows)) <= expected
    full = [w for w in windows if len(w)]
    for earlier, later in pairwise(full):
        assert later.min() - earlier.max() > (WINDOW - 1) * MINUTE


def test_normalisation_uses_only_the_lookback() -> None:
    values = Market(4, MINUTE, seed=1).run(40).values.swapaxes(0, 1)
    lookback = np.array([10, 20, 30, 39])
    clean = normalise(values, lookback)
    poisoned = values.copy()
    for row, bars in zip(poisoned, lookback, strict=True):
        row[bars:] = np.nan
    dirty = normalise(poisoned, lookback)
    for row, bars in enumerate(lookback):
        np.testing.assert_array_equal(clean[row, :bars], dirty[row, :bars])
        scaled = clean[row, :bars].astype(np.float64)
        np.testing.assert_allclose(scaled[:, 3].mean(), 0, atol=1e-3)
        assert np.isnan(dirty[row, bars:]).all()


def test_loss_weights_sum_to_one_and_are_lower_before_the_origin() -> None:
    windows = GeneratedWindows(("5m",), 32, 0).draw(0, 4, np.arange(4))
    batch = make_batch(windows, np.array([8, 16, 24, 30]), 0.25)
    np.testing.assert_allclose(batch.weights.sum(1).numpy(), 1, rtol=1e-5)
    np.testing.assert_allclose((batch.weights[:, 0] / batch.weights[:, -1]).numpy(), 0.25)


def test_time_stamps_equal_the_calendar() -> None:
    times = pd.to_datetime(["2024-02-29T23:59:00Z", "1999-12-31T00:00:00Z"])
    stamps = time_stamps(times.tz_localize(None).to_numpy("datetime64[ms]").astype(np.int64))
    assert stamps.tolist() == [[59, 23, 3, 29, 2], [0, 0, 4, 31, 12]]


def test_windows_of_a_step_do_not_depend_on_the_requested_rows() -> None:
    source = GeneratedWindows(("1m", "1h"), 64, 3)
    whole = source.draw(7, 6, np.arange(6))
    part = GeneratedWindows(("1m", "1h"), 64, 3).draw(7, 6, np.array([1, 4]))
    np.testing.assert_array_equal(whole.values[[1, 4]], part.values)
    held_out = GeneratedWindows(("1m", "1h"), 64, 3, held_out=True).draw(7, 6, np.arange(6))
    assert not np.isin(held_out.values[..., 3], whole.values[..., 3]).all()


def test_all_file_formats_give_the_same_windows(tmp_path: Path) -> None:
    table = frame(START_MS + MINUTE * np.arange(100))
    writers: dict[str, Callable[[Path], object]] = {
        "a.csv": lambda p: table.to_csv(p, index=False),
        "a.csv.gz": lambda p: table.to_csv(p, index=False),
        "a.parquet": table.to_parquet,
        # The format of freqtrade: a typed date, no amount.
        "a.feather": lambda p: (
            table.assign(date=pd.to_datetime(table.timestamp, unit="ms", utc=True))
            .drop(columns=["timestamp", "amount"])
            .to_feather(p)
        ),
    }
    drawn = []
    for name, write in writers.items():
        write(tmp_path / name)
        dataset = CandleDataset.prepare([tmp_path / name], tmp_path / f"{name}.store", WINDOW)
        source = dataset.source("train", 0)
        assert source is not None
        drawn.append(source.gather(np.arange(5)))
    for windows in drawn[1:]:
        np.testing.assert_array_equal(windows.times, drawn[0].times)
        np.testing.assert_allclose(windows.values[..., :5], drawn[0].values[..., :5])


def write_qlib(folder: Path, closes: NDArray[np.float32]) -> pd.DatetimeIndex:
    """Write a Qlib folder of one instrument that starts at the calendar's third business day."""
    days = pd.bdate_range("2020-01-01", periods=len(closes) + 2)
    (folder / "calendars").mkdir(parents=True)
    (folder / "calendars" / "day.txt").write_text("\n".join(d.strftime("%Y-%m-%d") for d in days))
    features = folder / "features" / "sh600000"
    features.mkdir(parents=True)
    for name in ("open", "high", "low", "close", "volume"):
        np.concatenate(([2.0], closes)).astype("<f4").tofile(features / f"{name}.day.bin")
    return days


def test_weekends_are_no_gaps_in_qlib_folders(tmp_path: Path) -> None:
    closes = np.linspace(10, 20, 60, dtype=np.float32)
    closes[30] = np.nan  # a day without trading is a gap
    days = write_qlib(tmp_path / "cn", closes)
    dataset = CandleDataset.prepare([tmp_path / "cn"], tmp_path / "store", WINDOW)
    assert [s.bars for s in dataset.segments] == [30, 29]
    source = dataset.source("train", 0)
    assert source is not None
    first = source.gather(np.array([0]))
    expected = days[2 : 2 + WINDOW].to_numpy("datetime64[ms]").astype(np.int64)
    np.testing.assert_array_equal(first.times[0], expected)
    np.testing.assert_allclose(first.values[0, :, 3], closes[:WINDOW], rtol=1e-6)


def test_a_store_is_reused_until_its_files_change(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    frame(START_MS + MINUTE * np.arange(60)).to_csv(file, index=False)
    store = tmp_path / "store"
    CandleDataset.prepare([file], store, WINDOW)
    made = (store / "index.json").stat().st_mtime_ns
    CandleDataset.prepare([file], store, WINDOW)
    assert (store / "index.json").stat().st_mtime_ns == made
    frame(START_MS + MINUTE * np.arange(90)).to_csv(file, index=False)
    assert sum(s.bars for s in CandleDataset.prepare([file], store, WINDOW).segments) == 90


GOOD = "time,open,high,low,close,volume\n"
BAD_FILES = {
    "missing column": ("time,open,high,low\n1700000000,1,1,1\n", "missing column close"),
    "unsorted": (GOOD + "1700000060,1,1,1,1,1\n1700000000,1,1,1,1,1\n", "sort by time"),
    "duplicated": (GOOD + "1700000000,1,1,1,1,1\n" * 2, "one bar per time"),
    "nan": (GOOD + "1700000000,1,1,1,,1\n1700000060,1,1,1,1,1\n", "close is missing"),
    "empty": ("", "empty"),
    "only gaps": (
        GOOD + "".join(f"{1700000000 + 60 * (i + 100 * (i // 3))},1,1,1,1,1\n" for i in range(30)),
        "no window of 8 bars",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_an_invalid_file_is_reported_in_one_line_and_leaves_no_store(
    tmp_path: Path, name: str
) -> None:
    text, reason = BAD_FILES[name]
    file = tmp_path / "bad.csv.gz"
    file.write_bytes(gzip.compress(text.encode()))
    good = tmp_path / "a.csv"
    frame(START_MS + MINUTE * np.arange(60)).to_csv(good, index=False)
    files = [file] if name == "only gaps" else [good, file]
    with pytest.raises((CandleFileError, TrainingError), match=reason) as caught:
        CandleDataset.prepare(files, tmp_path / "store", WINDOW)
    assert "\n" not in str(caught.value)
    left = {p.name for p in tmp_path.iterdir()}
    assert left - {"bad.csv.gz", "a.csv", "store"} == set()
    assert ("store" in left) == (name == "only gaps")


def test_missing_files_and_empty_folders_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="No such file"):
        CandleDataset.prepare([tmp_path / "no.csv"], tmp_path / "store", WINDOW)
    (tmp_path / "none").mkdir()
    with pytest.raises(TrainingError, match="no candle files"):
        CandleDataset.prepare([tmp_path / "none"], tmp_path / "store", WINDOW)
