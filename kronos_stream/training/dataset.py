"""Windows of candles from files, split by time into training, validation and test data.

Files are read once, one after the other, into a flat store on disk that training maps into
memory, so a data set may be larger than memory (a single file may not). The store holds segments
without gaps; a window lies within one segment.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kronos_stream.market.candle_files import read_candles
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.training.errors import TrainingError
from kronos_stream.training.qlib import ContiguousBars, is_qlib, read_qlib
from kronos_stream.training.windows import Windows, step_rng

Split = Literal["train", "valid", "test"]

_SUFFIXES = (".csv", ".csv.gz", ".csv.zst", ".parquet", ".pq", ".feather")
_INDEX, _TIMES, _VALUES = "index.json", "times.i64", "values.f64"


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment without gaps: rows ``start`` to ``start + bars``."""

    start: int
    bars: int
    first_ms: int
    last_ms: int
    step_ms: int


class CandleDataset:
    """All windows of ``window`` bars without a gap, split by time into three parts.

    All files are split at the same times, because markets are correlated: windows of different
    parts do not overlap in time and are at least one window apart.
    """

    def __init__(
        self, folder: Path, window: int, *, valid_share: float = 0.1, test_share: float = 0.1
    ) -> None:
        index = json.loads((folder / _INDEX).read_text())
        self.segments = [Segment(**s) for s in index["segments"]]
        self.window = window
        bars = sum(s.bars for s in self.segments)
        self._times = np.memmap(folder / _TIMES, np.int64, "r", shape=(bars,))
        self._values = np.memmap(folder / _VALUES, np.float64, "r", shape=(bars, 6))
        self.valid_from = _split_time(self.segments, 1 - valid_share - test_share)
        self.test_from = _split_time(self.segments, 1 - test_share)

    @classmethod
    def prepare(
        cls,
        paths: Sequence[Path],
        store: Path,
        window: int,
        *,
        timeframe: Timeframe | None = None,
        valid_share: float = 0.1,
        test_share: float = 0.1,
    ) -> CandleDataset:
        """Read ``paths`` (files and folders) into ``store``, unless the store is current.

        Raises CandleFileError or TrainingError; a file that cannot be read leaves no store behind.
        """
        files = [file for path in paths for file in _expand(path)]
        fingerprint = [_fingerprint(file) for file in files] + [str(timeframe)]
        if not _is_current(store, fingerprint):
            part = store.with_name(store.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            try:
                _fill(part, files, timeframe, fingerprint)
                shutil.rmtree(store, ignore_errors=True)
                part.rename(store)
            finally:
                shutil.rmtree(part, ignore_errors=True)
                with suppress(OSError):  # remove the folder if it was created for a bad file
                    part.parent.rmdir()
        dataset = cls(store, window, valid_share=valid_share, test_share=test_share)
        if not dataset.source("train", 0):
            longest = max((s.bars for s in dataset.segments), default=0)
            raise TrainingError(
                f"no window of {window} bars to train on: the longest segment without a gap has "
                f"{longest} bars, some of them held out; give more data or a smaller window"
            )
        return dataset

    def source(self, split: Split, seed: int) -> FileWindows | None:
        """Windows of one part; None if it has none."""
        low, high = self._bounds(split)
        starts, counts = [], []
        for segment in self.segments:
            # First and last start of a window of this part, relative to the segment.
            times = self._times[segment.start : segment.start + segment.bars]
            embargo = 0 if split == "train" else self.window * segment.step_ms
            first = int(np.searchsorted(times, low + embargo)) if low is not None else 0
            end = len(times) if high is None else int(np.searchsorted(times, high))
            count = end - first - self.window + 1
            if count > 0:
                starts.append(segment.start + first)
                counts.append(count)
        if not counts:
            return None
        return FileWindows(self._times, self._values, self.window, starts, counts, seed)

    def _bounds(self, split: Split) -> tuple[int | None, int | None]:
        if split == "train":
            return None, self.valid_from
        return (self.valid_from, self.test_from) if split == "valid" else (self.test_from, None)


class FileWindows:
    """Source that draws the windows of one part with equal probability."""

    def __init__(
        self,
        times: NDArray[np.int64],
        values: NDArray[np.float64],
        window: int,
        starts: list[int],
        counts: list[int],
        seed: int,
    ) -> None:
        self._times, self._values, self._window, self._seed = times, values, window, seed
        self._starts = np.array(starts)
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def draw(self, step: int, batch: int, rows: NDArray[np.int64]) -> Windows:
        """Return the given rows of the batch of ``step``."""
        picks = step_rng(self._seed, step, 2).integers(len(self), size=batch)[rows]
        return self.gather(picks)

    def gather(self, picks: NDArray[np.int64]) -> Windows:
        """Return the windows with these indices, each below ``len``."""
        which = np.searchsorted(self._ends, picks, side="right")
        before = np.concatenate(([0], self._ends[:-1]))[which]
        rows = (self._starts[which] + picks - before)[:, None] + np.arange(self._window)
        return Windows(np.asarray(self._values[rows]), np.asarray(self._times[rows]))


def _expand(path: Path) -> list[Path]:
    if not path.is_dir() or is_qlib(path):
        return [path]
    files = sorted(p for p in path.rglob("*") if p.name.lower().endswith(_SUFFIXES))
    if not files:
        raise TrainingError(f"{path}: contains no candle files ({', '.join(_SUFFIXES)})")
    return files


def _fingerprint(path: Path) -> str:
    if path.is_dir():
        parts = [_fingerprint(p) for p in sorted(path.rglob("*")) if p.is_file()]
        return f"{path.resolve()} {_short_hash(parts)}"
    try:
        stat = path.stat()
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror or error}") from None
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def _short_hash(parts: list[str]) -> str:
    """Short hash of several lines."""
    return sha256("\n".join(parts).encode()).hexdigest()[:16]


def _is_current(store: Path, fingerprint: list[str]) -> bool:
    try:
        return bool(json.loads((store / _INDEX).read_text())["files"] == fingerprint)
    except (OSError, ValueError, KeyError):
        return False


def _read(path: Path, timeframe: Timeframe | None) -> Iterator[ContiguousBars]:
    if path.is_dir():
        yield from read_qlib(path)
        return
    table = read_candles(path, timeframe)
    for first, end in table.contiguous_ranges():
        times = table.times[first:end]
        step = table.timeframe.milliseconds or int(np.diff(times).max(initial=0))
        yield ContiguousBars(times, table.values[first:end], step)


def _fill(
    folder: Path, files: list[Path], timeframe: Timeframe | None, fingerprint: list[str]
) -> None:
    segments: list[Segment] = []
    rows = 0
    with (folder / _TIMES).open("wb") as times, (folder / _VALUES).open("wb") as values:
        for file in files:
            for s in _read(file, timeframe):
                times.write(np.ascontiguousarray(s.times, np.int64).tobytes())
                values.write(np.ascontiguousarray(s.values, np.float64).tobytes())
                segments.append(
                    Segment(rows, len(s.times), int(s.times[0]), int(s.times[-1]), s.step_ms)
                )
                rows += len(s.times)
        for written in (times, values):
            written.flush()
            os.fsync(written.fileno())
    if not rows:
        raise TrainingError("the data contain no candles; give other files")
    index = {"files": fingerprint, "segments": [asdict(s) for s in segments]}
    (folder / _INDEX).write_text(json.dumps(index))


def _split_time(segments: list[Segment], share: float) -> int:
    """Return the time, UTC ms, before which about ``share`` of all bars open."""
    low = min(s.first_ms for s in segments)
    high = max(s.last_ms + s.step_ms for s in segments)
    total = sum(s.bars for s in segments)
    while high - low > 1:
        middle = (low + high) // 2
        before = sum(
            s.bars
            * min(
                1.0, max(0.0, (middle - s.first_ms) / (s.last_ms + max(s.step_ms, 1) - s.first_ms))
            )
            for s in segments
        )
        low, high = (middle, high) if before < share * total else (low, middle)
    return high
