"""``kronos-stream forecast`` on the tiny checkpoint, compared with the engine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from kronos_stream import Context, Forecaster
from kronos_stream.commands import _forecast
from kronos_stream.commands.forecast import forecast
from kronos_stream.forecast.quantiles import weibull_quantiles
from kronos_stream.market.candle_files import read_candles
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.utc import rfc3339
from tests.support.command_line import (
    START_MS,
    STEP_MS,
    CommandLine,
    assert_usage_error,
    write_candles,
)


@pytest.fixture
def model(parity_folder: Path) -> str:
    """Folder of the tiny checkpoint, trained on a window of 128 bars."""
    return str(parity_folder / "tiny")


@pytest.fixture
def candles(tmp_path: Path) -> Path:
    path = tmp_path / "coin.csv"
    write_candles(path)
    return path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], model: str) -> CommandLine:
    return CommandLine(capsys, model)


def _sample(model: str, file: Path, *, series: str | None = None, **options: Any) -> np.ndarray:
    forecaster = Forecaster.from_pretrained(model, device="cpu", dtype="float32", max_context=128)
    table = read_candles(file)
    context = Context(table.values, table.times, series=series, timeframe="5m")
    return forecaster.sample([context], top_p=0.9, anchor=True, **options)[0]


def test_every_option_is_explained(command: CommandLine) -> None:
    assert all(getattr(p, "help", "") for p in forecast.params if p.name != "file")
    shown = command.run("forecast", "--help")
    assert shown.status == 0
    assert max(map(len, shown.out.splitlines())) <= 80


def test_table_fits_80_columns(command: CommandLine, candles: Path) -> None:
    done = command.forecast(candles, "--horizon", 4, "--series", "x:[A]/B:5m")
    assert done.status == 0
    assert done.out.splitlines()[0].startswith("x:[A]/B:5m  origin 2024-06-18T18:40:00Z  last ")
    assert max(map(len, done.out.splitlines())) <= 80
    rows = [line.split() for line in done.out.splitlines() if line.strip().startswith("06-18 ")]
    assert [row[1] for row in rows] == ["18:45", "18:50", "18:55", "19:00"]
    for row in rows:
        prices = [float(cell) for cell in row[2:]]
        assert len(prices) == 5
        assert prices == sorted(prices)
    assert "After 4 bars: P(up) " in done.out
    assert "note: lookback 488 clipped to 90 bars: the file has no more" in done.err


def test_table_with_many_quantiles_is_wider_without_truncation(
    command: CommandLine, candles: Path
) -> None:
    probs = ",".join(f"{p / 20:g}" for p in range(1, 20))
    done = command.forecast(candles, "--horizon", 2, "--quantiles", probs)
    rows = [line.split() for line in done.out.splitlines() if line.strip().startswith("06-18 ")]
    assert [len(row) for row in rows] == [21, 21]


def test_json_agrees_with_sample(command: CommandLine, candles: Path, model: str) -> None:
    options = ("--series", "x:A/B:5m", "--horizon", 6, "--paths", 20, "--seed", 3, "--json")
    done = command.forecast(candles, *options)
    assert done.status == 0
    got = json.loads(done.out)
    paths = _sample(model, candles, series="x:A/B:5m", horizon=6, paths=20, seed=3)
    closes = paths[..., 3]
    table = read_candles(candles)
    last = float(table.values[-1, 3])  # noqa: PD011
    assert np.allclose(got["close"]["q05"], weibull_quantiles(closes, [0.05])[0], rtol=1e-12)
    assert np.allclose(got["close"]["mean"], closes.mean(0, dtype=np.float64), rtol=1e-12)
    assert got["summary"]["p_up"] == np.mean(closes[:, -1] > last)
    assert got["times"] == [rfc3339(int(table.times[-1]) + STEP_MS * h) for h in range(1, 7)]
    assert got["last"]["close"] == last
    assert got["sampling"]["seed"] == 3
    assert got["context"] == {
        "bars": 90,
        "first": "2024-06-18T11:15:00Z",
        "missing": 0,
        "volume": "reported",
        "amount": "derived",
    }


def test_out_has_every_path_and_blocks_equal_one_call(
    command: CommandLine, candles: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_forecast, "PATHS_PER_BLOCK", 32)
    out = tmp_path / "paths.parquet"
    done = command.forecast(candles, "--horizon", 5, "--paths", 77, "--out", out)
    assert done.status == 0
    file = pq.ParquetFile(out)
    assert file.num_row_groups == 3
    table = file.read()
    names = ["series", "origin", "path", "step", "time"]
    assert table.column_names == [*names, "open", "high", "low", "close", "volume", "amount"]
    assert str(table.schema.field("time").type) == "timestamp[ms, tz=UTC]"
    assert str(table.schema.field("origin").type) == "timestamp[ms, tz=UTC]"
    frame = table.to_pandas()
    assert set(frame["series"]) == {"coin"}
    assert frame["path"].tolist() == np.repeat(range(77), 5).tolist()
    assert frame["step"].tolist() == np.tile(range(1, 6), 77).tolist()
    origin = pd.Timestamp(START_MS + 89 * STEP_MS, unit="ms", tz="UTC")
    assert (frame["origin"] == origin).all()
    assert (frame["time"] - origin == pd.to_timedelta(5 * frame["step"], unit="min")).all()
    written = frame.iloc[:, 5:].to_numpy(np.float32).reshape(77, 5, 6)
    assert np.array_equal(written, _sample(model, candles, horizon=5, paths=77))
    settings = json.loads(table.schema.metadata[b"kronos_stream"])
    assert settings["sampling"]["paths"] == 77
    assert settings["model"]["name"] == model
    assert list(tmp_path.glob(".*")) == []


def test_at_forecasts_from_an_earlier_bar(
    command: CommandLine, candles: Path, tmp_path: Path
) -> None:
    shorter = tmp_path / "coin-then.csv"
    shorter.write_text("".join(candles.read_text().splitlines(keepends=True)[:61]))
    options = ("--series", "s", "--horizon", 3, "--json")
    then = command.forecast(shorter, *options)
    now = command.forecast(candles, *options, "--at", "2024-06-18 16:10")
    assert json.loads(now.out)["origin"] == "2024-06-18T16:10:00Z"
    assert now.out == then.out


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_is_an_image_of_the_suffix(
    command: CommandLine, candles: Path, tmp_path: Path, suffix: str
) -> None:
    plot = tmp_path / f"fan{suffix}"
    done = command.forecast(candles, "--horizon", 3, "--plot", plot, "--series", "$dollar$_{")
    assert done.status == 0
    start = plot.read_bytes()[:8]
    assert start == b"\x89PNG\r\n\x1a\n" if suffix == ".png" else start.startswith(b"<?xml")


def test_plot_of_flat_prices_without_volume(command: CommandLine, tmp_path: Path) -> None:
    times = [rfc3339(Timeframe.parse("1M").after(START_MS, k)) for k in range(40)]
    flat = tmp_path / "flat.csv"
    flat.write_text("date,open,high,low,close\n" + "".join(f"{t},5,5,5,5\n" for t in times))
    plot = tmp_path / "fan.png"
    options = ("--horizon", 1, "--plot", plot, "--quantiles", "0.5", "--paths", 1)
    done = command.forecast(flat, *options)
    assert done.status == 0, done.err
    assert "2027-10-18" in done.out
    assert plot.stat().st_size > 10_000


def test_missing_bars_are_reported(command: CommandLine, candles: Path) -> None:
    lines = candles.read_text().splitlines(keepends=True)
    candles.write_text("".join(lines[:20] + lines[23:]))
    done = command.forecast(candles, "--horizon", 2)
    assert done.status == 0
    assert "note: the lookback spans 3 missing bars, the first after 2024-06-18T12:45" in done.err


_BAD: dict[str, tuple[tuple[object, ...], str]] = {
    "quantiles": (("--paths", 18), "needs at least 19 paths, not 18: .*raise --paths"),
    "no quantile": (("--quantiles", "0.5,x"), "expected numbers between 0 and 1"),
    "quantile 1": (("--quantiles", "0.5,1"), "quantile 1 is not between 0 and 1"),
    "horizon": (("--horizon", 127), "--horizon 127 leaves no room .* 128 bars"),
    "quantile tiny": (("--quantiles", "1e-320"), "too close to 0"),
    "horizon 0": (("--horizon", 0), "0 is not in the range"),
    "temperature": (("--temperature", 0), "not in the range"),
    "tiny temperature": (("--temperature", 1e-4), "temperature 0.0001: each must be at least"),
    "temperature nan": (("--temperature", "nan"), "temperature nan: each must be"),
    "top-p nan": (("--top-p", "nan"), "top_p nan: must be above 0"),
    "timeframe": (("--timeframe", "5 minutes"), "expected a count and a unit"),
    "closer": (("--timeframe", "1h"), "closer than 1h bars"),
    "at word": (("--at", "noon"), "expected ISO 8601"),
    "at early": (("--at", "2020-01-01"), "before the file's first bar, 2024-06-18T11:15:00Z"),
    "at between": (("--at", "2024-06-18T12:01Z"), "the one before opens 2024-06-18T12:00:00Z"),
    "at year 10000": (("--at", "9999-12-31T23:59-23:00"), "expected ISO 8601"),
    "at first": (("--at", "2024-06-18T11:15Z"), "only one bar up to the origin"),
    "series": (("--series", "\udcff"), "not UTF-8"),
    "device": (("--device", "abacus"), "expected auto, cpu, mps, cuda"),
    "absent device": (("--device", "cuda:77"), "is not available"),
    "model": (("--model", "nowhere"), "nowhere"),
    "plot": (("--plot", "fan.jpeg"), "expected a name ending in .png"),
    "out": (("--out", "no/such/folder/x.parquet"), "no such folder"),
    "option": (("--horizons", 3), "No such option.*--horizons"),
}


@pytest.mark.parametrize("bad", _BAD)
def test_bad_option_is_one_line(command: CommandLine, candles: Path, bad: str) -> None:
    options, message = _BAD[bad]
    done = command.forecast(candles, *options)
    assert_usage_error(done, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "coin.csv: no such file"),
        ("time,open,high,low\n", "missing column close; found: time, open, high, low"),
        ("time,open,high,low,close\n2024-01-01,1,2,1,nan\n", "row 1 .*: close is missing"),
        ("time,open,high,low,close\n2024-01-01,1,2,1,1\n", "only one bar"),
    ],
)
def test_bad_file_is_one_line(
    command: CommandLine, candles: Path, content: str | None, message: str
) -> None:
    candles.unlink()
    if content is not None:
        candles.write_text(content)
    assert_usage_error(command.forecast(candles), message)


def test_quantiles_are_checked_before_files_are_read(command: CommandLine, tmp_path: Path) -> None:
    done = command.run("forecast", tmp_path / "none.csv", "--paths", 3, "--model", "no/model")
    assert_usage_error(done, "needs at least 19 paths")


def test_output_replaces_neither_input_nor_device(
    command: CommandLine, candles: Path, tmp_path: Path
) -> None:
    before = candles.read_bytes()
    assert_usage_error(command.forecast(candles, "--out", candles), "would destroy the input")
    picture = tmp_path / "fan.svg"
    assert_usage_error(
        command.forecast(candles, "--out", picture, "--plot", picture), "the same file"
    )
    pipe = tmp_path / "pipe"  # stands for /dev/null, which root could replace
    os.mkfifo(pipe)
    assert_usage_error(command.forecast(candles, "--out", pipe), "not an ordinary file")
    assert candles.read_bytes() == before
    assert pipe.is_fifo()
