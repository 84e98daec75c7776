"""The command as a user meets it: real processes on the tiny checkpoint."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from kronos_stream import Context, Forecaster
from kronos_stream.cli import main
from kronos_stream.commands import _forecast
from kronos_stream.forecast.plot import time_ticks
from kronos_stream.forecast.quantiles import weibull_quantiles
from kronos_stream.forecast.table import price_decimals
from kronos_stream.market.candle_files import read_candles
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.utc import parse_time, rfc3339

_COMMAND = [sys.executable, "-m", "kronos_stream"]
_START = 1_718_709_300_000  # 2024-06-18T11:15:00Z
_STEP = 300_000


@pytest.fixture
def model(parity_folder: Path) -> str:
    """The folder of the tiny checkpoint, trained on a window of 128 bars."""
    return str(parity_folder / "tiny")


@pytest.fixture
def candles(tmp_path: Path) -> Path:
    """A CSV of 90 five-minute bars."""
    rng = np.random.default_rng(7)
    close = 100 * np.exp(rng.normal(0, 0.004, 90).cumsum())
    opened = np.r_[100.0, close[:-1]]
    frame = pd.DataFrame(
        {
            "time": pd.to_datetime(_START + _STEP * np.arange(90), unit="ms", utc=True),
            "open": opened,
            "high": np.maximum(opened, close) * 1.001,
            "low": np.minimum(opened, close) * 0.999,
            "close": close,
            "volume": rng.uniform(1, 10, 90),
        }
    )
    path = tmp_path / "coin.csv"
    frame.to_csv(path, index=False)
    return path


class _Result:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


class _Run:
    """Runs the command in this process, where torch is loaded already."""

    def __init__(self, capsys: pytest.CaptureFixture[str], model: str) -> None:
        self._capsys, self._model = capsys, model

    def __call__(self, *arguments: object) -> _Result:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        out, err = self._capsys.readouterr()
        assert isinstance(exited.value.code, int)
        return _Result(exited.value.code, out, err)

    def forecast(self, file: Path, *options: object) -> _Result:
        exact = ("--model", self._model, "--max-context", 128, "--dtype", "float32")
        return self("forecast", file, *exact, "--device", "cpu", *options)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], model: str) -> _Run:
    return _Run(capsys, model)


def _sample(model: str, file: Path, *, series: str | None = None, **options: Any) -> np.ndarray:
    forecaster = Forecaster.from_pretrained(model, device="cpu", dtype="float32", max_context=128)
    table = read_candles(file)
    context = Context(table.values, table.times, series=series, timeframe="5m")
    return forecaster.sample([context], top_p=0.9, anchor=True, **options)[0]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from kronos_stream.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'pandas', 'matplotlib', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    for arguments in (["--help"], ["forecast", "--help"], ["--version"]):
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "kronos-stream" in done.stdout


def test_every_option_is_explained(run: _Run) -> None:
    from kronos_stream.commands.forecast import forecast

    assert all(getattr(p, "help", "") for p in forecast.params if p.name != "file")
    shown = run("forecast", "--help")
    assert shown.status == 0
    assert max(map(len, shown.out.splitlines())) <= 80


def test_the_table_fits_80_columns(run: _Run, candles: Path) -> None:
    done = run.forecast(candles, "--horizon", 4, "--series", "x:[A]/B:5m")
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


def test_many_quantiles_widen_the_table_instead_of_cutting_numbers(
    run: _Run, candles: Path
) -> None:
    probs = ",".join(f"{p / 20:g}" for p in range(1, 20))
    done = run.forecast(candles, "--horizon", 2, "--quantiles", probs)
    rows = [line.split() for line in done.out.splitlines() if line.strip().startswith("06-18 ")]
    assert [len(row) for row in rows] == [21, 21]


def test_json_says_what_sample_says(run: _Run, candles: Path, model: str) -> None:
    options = ("--series", "x:A/B:5m", "--horizon", 6, "--paths", 20, "--seed", 3, "--json")
    done = run.forecast(candles, *options)
    assert done.status == 0
    got = json.loads(done.out)
    paths = _sample(model, candles, series="x:A/B:5m", horizon=6, paths=20, seed=3)
    closes = paths[..., 3]
    table = read_candles(candles)
    last = float(table.values[-1, 3])  # noqa: PD011
    assert np.allclose(got["close"]["q05"], weibull_quantiles(closes, [0.05])[0], rtol=1e-12)
    assert np.allclose(got["close"]["mean"], closes.mean(0, dtype=np.float64), rtol=1e-12)
    assert got["summary"]["p_up"] == np.mean(closes[:, -1] > last)
    assert got["times"] == [rfc3339(int(table.times[-1]) + _STEP * h) for h in range(1, 7)]
    assert got["last"]["close"] == last
    assert got["sampling"]["seed"] == 3
    assert got["context"] == {
        "bars": 90,
        "first": "2024-06-18T11:15:00Z",
        "missing": 0,
        "volume": "reported",
        "amount": "derived",
    }


def test_out_holds_every_path_and_blocks_equal_one_call(
    run: _Run, candles: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_forecast, "PATHS_PER_BLOCK", 32)
    out = tmp_path / "paths.parquet"
    done = run.forecast(candles, "--horizon", 5, "--paths", 77, "--out", out)
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
    origin = pd.Timestamp(_START + 89 * _STEP, unit="ms", tz="UTC")
    assert (frame["origin"] == origin).all()
    assert (frame["time"] - origin == pd.to_timedelta(5 * frame["step"], unit="min")).all()
    written = frame.iloc[:, 5:].to_numpy(np.float32).reshape(77, 5, 6)
    assert np.array_equal(written, _sample(model, candles, horizon=5, paths=77))
    settings = json.loads(table.schema.metadata[b"kronos_stream"])
    assert settings["sampling"]["paths"] == 77
    assert settings["model"]["name"] == model
    assert list(tmp_path.glob(".*")) == []


def test_at_forecasts_from_an_earlier_bar(run: _Run, candles: Path, tmp_path: Path) -> None:
    shorter = tmp_path / "coin-then.csv"
    shorter.write_text("".join(candles.read_text().splitlines(keepends=True)[:61]))
    options = ("--series", "s", "--horizon", 3, "--json")
    then = run.forecast(shorter, *options)
    now = run.forecast(candles, *options, "--at", "2024-06-18 16:10")
    assert json.loads(now.out)["origin"] == "2024-06-18T16:10:00Z"
    assert now.out == then.out


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot(run: _Run, candles: Path, tmp_path: Path, suffix: str) -> None:
    plot = tmp_path / f"fan{suffix}"
    done = run.forecast(candles, "--horizon", 3, "--plot", plot, "--series", "$dollar$_{")
    assert done.status == 0
    start = plot.read_bytes()[:8]
    assert start == b"\x89PNG\r\n\x1a\n" if suffix == ".png" else start.startswith(b"<?xml")


def test_files_without_volume_and_flat_prices_are_drawn(run: _Run, tmp_path: Path) -> None:
    times = [rfc3339(Timeframe.parse("1M").after(_START, k)) for k in range(40)]
    flat = tmp_path / "flat.csv"
    flat.write_text("date,open,high,low,close\n" + "".join(f"{t},5,5,5,5\n" for t in times))
    plot = tmp_path / "fan.png"
    options = ("--horizon", 1, "--plot", plot, "--quantiles", "0.5", "--paths", 1)
    done = run.forecast(flat, *options)
    assert done.status == 0, done.err
    assert "2027-10-18" in done.out
    assert plot.stat().st_size > 10_000


def test_missing_bars_are_mentioned(run: _Run, candles: Path) -> None:
    lines = candles.read_text().splitlines(keepends=True)
    candles.write_text("".join(lines[:20] + lines[23:]))
    done = run.forecast(candles, "--horizon", 2)
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
    "top-p nan": (("--top-p", "nan"), "top_p nan: above 0"),
    "timeframe": (("--timeframe", "5 minutes"), "expected a count and a unit"),
    "closer": (("--timeframe", "1h"), "closer than 1h bars"),
    "at word": (("--at", "noon"), "expected ISO 8601"),
    "at early": (("--at", "2020-01-01"), "before the file's first bar, 2024-06-18T11:15:00Z"),
    "at between": (("--at", "2024-06-18T12:01Z"), "the one before opens 2024-06-18T12:00:00Z"),
    "at year 10000": (("--at", "9999-12-31T23:59-23:00"), "expected ISO 8601"),
    "at first": (("--at", "2024-06-18T11:15Z"), "only one bar up to the origin"),
    "series": (("--series", "\udcff"), "not UTF-8"),
    "device": (("--device", "abacus"), "expected auto, cpu, mps, cuda"),
    "absent device": (("--device", "cuda:77"), "not usable here"),
    "model": (("--model", "nowhere"), "nowhere"),
    "plot": (("--plot", "fan.jpeg"), "expected a name ending in .png"),
    "out": (("--out", "no/such/folder/x.parquet"), "no such folder"),
    "option": (("--horizons", 3), "No such option.*--horizons"),
}


@pytest.mark.parametrize("bad", _BAD)
def test_bad_requests_end_in_one_line(run: _Run, candles: Path, bad: str) -> None:
    options, message = _BAD[bad]
    done = run.forecast(candles, *options)
    _assert_refused(done, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "coin.csv: no such file"),
        ("time,open,high,low\n", "missing column close; found: time, open, high, low"),
        ("time,open,high,low,close\n2024-01-01,1,2,1,nan\n", "row 1 .*: close is missing"),
        ("time,open,high,low,close\n2024-01-01,1,2,1,1\n", "only one bar"),
    ],
)
def test_bad_files_end_in_one_line(
    run: _Run, candles: Path, content: str | None, message: str
) -> None:
    candles.unlink()
    if content is not None:
        candles.write_text(content)
    _assert_refused(run.forecast(candles), message)


def _assert_refused(done: _Result, message: str) -> None:
    lines = [line for line in done.err.splitlines() if not line.startswith("note: ")]
    assert (done.status, done.out, len(lines)) == (2, "", 1), done.err
    assert re.search(rf"^kronos-stream: error: .*{message}", lines[0]), done.err


def test_quantiles_are_judged_before_anything_is_read(run: _Run, tmp_path: Path) -> None:
    done = run("forecast", tmp_path / "none.csv", "--paths", 3, "--model", "no/model")
    _assert_refused(done, "needs at least 19 paths")


def test_unknown_commands(run: _Run) -> None:
    _assert_refused(run("forcast"), "No such command 'forcast'")
    nothing = run()
    assert nothing.status == 2
    assert "Usage: kronos-stream" in nothing.err


def test_outputs_replace_neither_the_input_nor_a_device(
    run: _Run, candles: Path, tmp_path: Path
) -> None:
    before = candles.read_bytes()
    _assert_refused(run.forecast(candles, "--out", candles), "would destroy the input")
    picture = tmp_path / "fan.svg"
    _assert_refused(run.forecast(candles, "--out", picture, "--plot", picture), "the same file")
    pipe = tmp_path / "pipe"  # stands for /dev/null, which root could replace
    os.mkfifo(pipe)
    _assert_refused(run.forecast(candles, "--out", pipe), "not an ordinary file")
    assert candles.read_bytes() == before
    assert pipe.is_fifo()


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full")
def test_a_full_disk_under_stdout_is_one_line(candles: Path, model: str) -> None:
    options = ["--model", model, "--max-context", "128", "--horizon", "2"]
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(  # noqa: S603
            [*_COMMAND, "forecast", str(candles), *options],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="no signals to another process there")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_leaves_no_file_and_no_traceback(
    candles: Path, model: str, tmp_path: Path, name: str
) -> None:
    number = getattr(signal, name)
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{name} is ignored here, as under nohup, and so it is by what we start")
    out = tmp_path / "paths.parquet"
    out.write_text("the old one")
    options = ["--model", model, "--max-context", "128", "--paths", "1000000", "--out", str(out)]
    process = subprocess.Popen(  # noqa: S603
        [*_COMMAND, "forecast", str(candles), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        patience = time.monotonic() + 300
        while not list(tmp_path.glob(".paths.parquet.*")) and time.monotonic() < patience:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(number)
        printed, said = process.communicate(timeout=300)
    finally:
        process.kill()  # or it would draw its million paths whatever becomes of us
    assert process.returncode == 128 + number, said
    assert printed == ""
    assert "Traceback" not in said
    assert out.read_text() == "the old one"
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize(
    ("price", "decimals"), [(0, 2), (64_213.5, 1), (0.1044, 6), (1.2, 5), (1e7, 0), (-37.6, 4)]
)
def test_six_significant_digits(price: float, decimals: int) -> None:
    assert price_decimals(price) == decimals


@pytest.mark.parametrize("text", ["1s", "5m", "1h", "1d", "1w", "1M"])
def test_ticks_are_few_and_say_the_date(text: str) -> None:
    timeframe = Timeframe.parse(text)
    start = parse_time("2024-02-27T22:30")
    ticks, labels = time_ticks(np.array([timeframe.after(start, k) for k in range(124)]))
    assert 2 <= len(ticks) == len(labels) <= 9
    assert re.search(r"\b20\d\d$", labels[0])
