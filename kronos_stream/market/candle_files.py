"""Candle files: CSV (plain or compressed), Parquet or Feather.

A file is read completely or rejected: every bar is checked, and the first fault is reported with
the file, the row (counted from 1 after the header), the bar's time and the remedy. Gaps between
bars are allowed; :attr:`CandleTable.gaps` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kronos_stream.channels import CHANNELS
from kronos_stream.market.spacing import common_step, find_gaps, infer_timeframe
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.utc import rfc3339

# Accepted column names, in order of preference; compared in lower case, spaces as underscores.
_ALIASES = {
    "time": ("timestamp", "timestamps", "datetime", "open_time", "time", "date", "unix"),
    "open": ("open", "o"),
    "high": ("high", "h"),
    "low": ("low", "l"),
    "close": ("close", "c"),
    "volume": ("volume", "vol", "base_volume", "v"),
    "amount": ("amount", "quote_volume", "quote_asset_volume", "quotevolume", "turnover", "amt"),
}

# Binance's public dumps have no header row, and these columns.
_BINANCE_DUMP = [
    "open_time", "open", "high", "low", "close", "volume", "close_time", "quote_volume",
    "trades", "taker_base", "taker_quote", "ignore",
]  # fmt: skip

_TABLE_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".parquet": pd.read_parquet,
    ".pq": pd.read_parquet,
    ".feather": pd.read_feather,
    ".arrow": pd.read_feather,
}
_TEXT_SUFFIXES = {".csv": ",", ".txt": ",", ".tsv": "\t"}

# Units of epoch times by magnitude; the years 1973 to 5138 are unambiguous.
_EPOCH_UNITS = ((1e11, 1e3), (1e14, 1.0), (1e17, 1e-3), (1e20, 1e-6))
_EPOCH_SMALLEST = 1e8


class CandleFileError(ValueError):
    """A file without usable candles; the one-line message names the place and the remedy."""


@dataclass(frozen=True, slots=True, eq=False)
class CandleTable:
    """Candles of one series, oldest first.

    ``times``: (N,) bar opens, UTC ms, strictly increasing. ``values``: (N, 6) finite, columns as
    in :data:`~kronos_stream.channels.CHANNELS`, prices as written. Without amounts in the file,
    amount is volume times mean(open, high, low, close); without volumes, both are 0.
    """

    path: Path
    times: NDArray[np.int64]
    values: NDArray[np.float64]
    timeframe: Timeframe
    has_volume: bool
    has_amount: bool

    def __len__(self) -> int:
        return len(self.times)

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """Gaps as (open time of the bar before, UTC ms; number of missing bars)."""
        return find_gaps(self.times, self.timeframe)

    def contiguous_ranges(self) -> list[tuple[int, int]]:
        """Split the rows at the gaps, into (first, end) of each part."""
        cuts = np.searchsorted(self.times, [before for before, _ in self.gaps]) + 1
        return list(pairwise([0, *cuts.tolist(), len(self)]))


def read_candles(path: str | Path, timeframe: Timeframe | None = None) -> CandleTable:
    """Read and check the candles in ``path``; raises :class:`CandleFileError`.

    The suffix names the format: ``.csv``, ``.txt`` or ``.tsv`` (also ``.gz``, ``.bz2``, ``.xz``,
    ``.zip``, ``.zst``), ``.parquet``, ``.feather``. Times may be epoch seconds to nanoseconds, ISO
    8601 (no zone means UTC) or a time type. ``timeframe`` defaults to the most common distance
    between bars.
    """
    path = Path(path)
    frame = _load(path)
    columns = _match_columns(path, frame)
    if frame.empty:
        _fail(path, "no candles in it")
    times = _times(path, columns["time"])
    values = np.zeros((len(times), len(CHANNELS)))
    for i, name in enumerate(CHANNELS):
        if name in columns:
            values[:, i] = _numbers(path, name, columns[name], times)
    _check_order(path, times)
    _check_candles(path, times, values)
    has_volume = "volume" in columns
    has_amount = has_volume and "amount" in columns
    if has_volume and not has_amount:
        values[:, 5] = values[:, 4] * values[:, :4].mean(axis=1)
    elif not has_volume:
        values[:, 5] = 0.0
    timeframe = _timeframe(path, times, timeframe)
    return CandleTable(path, times, values, timeframe, has_volume, has_amount)


def _fail(path: Path, reason: str) -> NoReturn:
    raise CandleFileError(f"{path}: {reason}") from None


def _fail_row(path: Path, row: int, times: NDArray[np.int64], reason: str) -> NoReturn:
    _fail(path, f"row {row + 1} ({rfc3339(int(times[row]))}): {reason}")


def _load(path: Path) -> pd.DataFrame:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    separator = next((_TEXT_SUFFIXES[s] for s in suffixes if s in _TEXT_SUFFIXES), None)
    try:
        if (read := _TABLE_READERS.get(path.suffix.lower())) is not None:
            return _index_as_column(read(path))
        if separator is not None:
            return _load_text(path, separator)
    except FileNotFoundError:
        _fail(path, "no such file")
    except pd.errors.EmptyDataError:
        _fail(path, "the file is empty")
    # A damaged file may raise errors of any library involved in reading it.
    except Exception as error:  # noqa: BLE001
        reason = " ".join(str(error).split())[:200]
        _fail(path, f"not readable ({type(error).__name__}: {reason})")
    _fail(path, "unknown kind of file; expected .csv (also .gz, .zst), .parquet or .feather")


def _load_text(path: Path, separator: str) -> pd.DataFrame:
    header = _read_csv(path, separator, rows=0).columns
    if pd.to_numeric(header.to_series(), errors="coerce").isna().any():
        return _read_csv(path, separator)
    if len(header) != len(_BINANCE_DUMP):
        _fail(path, "the first row holds numbers; add a header such as time,open,high,low,close")
    return _read_csv(path, separator, names=_BINANCE_DUMP)


def _read_csv(
    path: Path, separator: str, rows: int | None = None, names: list[str] | None = None
) -> pd.DataFrame:
    source: Path | IO[bytes] = path
    if path.suffix.lower() == ".zst":  # pandas would need another package; Arrow is installed
        import pyarrow as pa

        source = pa.input_stream(str(path), compression="zstd")
    return pd.read_csv(
        source,
        sep=separator,
        nrows=rows,
        names=names,
        index_col=False,
        skipinitialspace=True,
        low_memory=False,
    )


def _index_as_column(frame: pd.DataFrame) -> pd.DataFrame:
    """Turn a stored pandas index, which often holds the times, into a column."""
    if isinstance(frame.index, pd.MultiIndex):
        return frame.reset_index()
    if isinstance(frame.index, pd.RangeIndex) and frame.index.name is None:
        return frame
    return frame.rename_axis(str(frame.index.name or "time")).reset_index()


def _match_columns(path: Path, frame: pd.DataFrame) -> dict[str, pd.Series]:
    names: dict[str, int] = {}
    for position, name in enumerate(frame.columns):
        names.setdefault(str(name).strip().lower().replace(" ", "_"), position)
    found = {
        field: frame.iloc[:, names[alias]]
        for field, aliases in _ALIASES.items()
        for alias in reversed(aliases)  # the most preferred name overwrites the others
        if alias in names
    }
    missing = [field for field in ("time", *CHANNELS[:4]) if field not in found]
    if missing:
        has = ", ".join(str(name) for name in frame.columns) or "none"
        _fail(path, f"missing column{'s'[: len(missing) > 1]} {', '.join(missing)}; found: {has}")
    return found


def _times(path: Path, column: pd.Series) -> NDArray[np.int64]:
    if not pd.api.types.is_datetime64_any_dtype(column):
        numbers = pd.to_numeric(column, errors="coerce")
        if pd.notna(numbers.iloc[0]):
            return _epoch_times(path, column, numbers.to_numpy(np.float64, na_value=np.nan))
    stamps = pd.to_datetime(column, utc=True, format="ISO8601", errors="coerce")
    bad = np.flatnonzero(stamps.isna())
    if bad.size:
        _fail_time(path, column, int(bad[0]))
    naive = stamps.dt.tz_localize(None).to_numpy("datetime64[ms]")
    return np.asarray(naive, np.int64)


def _epoch_times(path: Path, column: pd.Series, numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    size = np.abs(numbers)
    bad = np.flatnonzero(~((size >= _EPOCH_SMALLEST) & (size < _EPOCH_UNITS[-1][0])))
    if bad.size:
        _fail_time(path, column, int(bad[0]))
    # Per bar, since venues have changed units within one archive.
    scale = np.select([size < limit for limit, _ in _EPOCH_UNITS], [s for _, s in _EPOCH_UNITS])
    times: NDArray[np.int64] = np.rint(numbers * scale).astype(np.int64)
    return times


def _fail_time(path: Path, column: pd.Series, row: int) -> NoReturn:
    _fail(
        path,
        f"row {row + 1}: {column.iloc[row]!s:.40} is not a time; expected epoch s, ms, us or ns, "
        "or ISO 8601 such as 2024-06-18T11:15:00Z",
    )


def _numbers(
    path: Path, name: str, column: pd.Series, times: NDArray[np.int64]
) -> NDArray[np.float64]:
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    bad = np.flatnonzero(~np.isfinite(numbers))
    if bad.size:
        row = int(bad[0])
        value = column.iloc[row]
        reason = "missing" if pd.isna(value) else f"{value!s:.40}, not a finite number"
        _fail_row(path, row, times, f"{name} is {reason}; repair or remove the bar")
    return numbers


def _check_order(path: Path, times: NDArray[np.int64]) -> None:
    bad = np.flatnonzero(np.diff(times) <= 0)
    if not bad.size:
        return
    row = int(bad[0]) + 1
    if times[row] == times[row - 1]:
        _fail_row(path, row, times, "the same time as the row before; keep one bar per time")
    _fail_row(path, row, times, "earlier than the row before; sort by time, oldest first")


def _check_candles(path: Path, times: NDArray[np.int64], values: NDArray[np.float64]) -> None:
    opened, high, low, close, volume, amount = values.T
    conditions = {
        "high < low": high < low,
        "high < open or close": high < np.maximum(opened, close),
        "low > open or close": low > np.minimum(opened, close),
        "volume < 0": volume < 0,
        "amount < 0": amount < 0,
    }
    rows = {reason: int(np.argmax(wrong)) for reason, wrong in conditions.items() if wrong.any()}
    if not rows:
        return
    reason = min(rows, key=lambda reason: rows[reason])
    row = rows[reason]
    bar = ", ".join(f"{n} {v:g}" for n, v in zip(CHANNELS, values[row], strict=True))
    _fail_row(path, row, times, f"impossible candle, {reason} ({bar}); repair or remove the bar")


def _timeframe(path: Path, times: NDArray[np.int64], requested: Timeframe | None) -> Timeframe:
    if len(times) == 1:
        return requested or _fail(
            path, "only one bar, so its timeframe is unknown; give --timeframe"
        )
    step = common_step(times)
    if requested is not None:
        if step < requested.min_milliseconds:
            _fail(
                path, f"its bars are mostly {step / 1000:g} s apart, closer than {requested} bars"
            )
        return requested
    try:
        return infer_timeframe(times)
    except ValueError:
        _fail(path, f"its bars are mostly {step} ms apart, which is no timeframe; give --timeframe")
