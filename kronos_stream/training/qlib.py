"""Read Qlib's data folders: a calendar, and per instrument one binary file per field.

``calendars/day.txt`` lists the bars' times, one a line; ``features/<instrument>/close.day.bin``
holds little-endian float32: the calendar position of its first value, then the values
(Qlib's documentation, "Converting CSV Format into Qlib Format"). NaN marks times without trading.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kronos_stream.channels import CHANNELS, PRICES
from kronos_stream.training.errors import TrainingError


@dataclass(frozen=True, slots=True)
class ContiguousBars:
    """Bars without a gap: ``times`` (N,) opens in UTC ms, ``values`` (N, 6)."""

    times: NDArray[np.int64]
    values: NDArray[np.float64]
    step_ms: int
    """Length of a bar; the longest one if the market closes at times."""


def is_qlib(folder: Path) -> bool:
    """Return whether ``folder`` is a Qlib data folder."""
    return (folder / "calendars").is_dir() and (folder / "features").is_dir()


def read_qlib(folder: Path) -> Iterator[ContiguousBars]:
    """Read the segments without gaps of every instrument, by position in the calendar."""
    calendars = sorted((folder / "calendars").glob("*.txt"))
    if len(calendars) != 1:
        raise TrainingError(
            f"{folder}: expected one calendar in calendars/, found {len(calendars)}"
        )
    frequency = calendars[0].stem
    times = _calendar(calendars[0])
    instruments = sorted(p for p in (folder / "features").iterdir() if p.is_dir())
    if not instruments:
        raise TrainingError(f"{folder}: no instruments in features/")
    for instrument in instruments:
        yield from _contiguous_bars(instrument, frequency, times)


def _calendar(path: Path) -> NDArray[np.int64]:
    try:
        times = pd.to_datetime(
            pd.Series(path.read_text().split("\n")).str.strip().loc[lambda s: s != ""],
            utc=True,
            format="ISO8601",
        )
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: not a calendar ({error})") from None
    stamps = times.dt.tz_localize(None).to_numpy("datetime64[ms]").astype(np.int64)
    if len(stamps) < 2 or (np.diff(stamps) <= 0).any():
        raise TrainingError(f"{path}: a calendar needs at least two times, in ascending order")
    return np.asarray(stamps, np.int64)


def _field(
    instrument: Path, name: str, frequency: str, bars: int
) -> tuple[int, NDArray[np.float64]] | None:
    path = instrument / f"{name}.{frequency}.bin"
    if not path.exists():
        return None
    raw = np.fromfile(path, "<f4")
    if len(raw) < 2 or not 0 <= raw[0] <= bars - (len(raw) - 1):
        raise TrainingError(f"{path}: does not fit its calendar of {bars} bars")
    return int(raw[0]), raw[1:].astype(np.float64)


def _contiguous_bars(
    instrument: Path, frequency: str, times: NDArray[np.int64]
) -> Iterator[ContiguousBars]:
    values = np.full((len(times), 6), np.nan)
    for column, name in enumerate(CHANNELS):
        found = _field(instrument, name, frequency, len(times))
        if found is not None:
            start, numbers = found
            values[start : start + len(numbers), column] = numbers
        elif name in CHANNELS[PRICES]:
            raise TrainingError(f"{instrument}: no {name}.{frequency}.bin")
        elif name == "volume":
            values[:, 4] = 0.0
        else:
            values[:, 5] = values[:, 4] * values[:, :4].mean(1)
    whole = np.isfinite(values).all(1)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], whole, [False])).astype(np.int8)))
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        part = times[first:end]
        step = int(np.diff(part).max()) if len(part) > 1 else 0
        yield ContiguousBars(part, values[first:end], step)
