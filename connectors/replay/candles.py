"""Candle files as recordings: each bar is available from its close on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from kronos_connectors.replay.recordings import DEFAULT_VENUE, FileSpec
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.candle_files import CandleFileError, CandleTable, read_candles
from kronos_stream.market.series import Series

_CHUNK = 4096
"""Rows converted to candles at a time."""

_SUFFIXES = {
    *(".csv", ".txt", ".tsv", ".parquet", ".pq", ".feather", ".arrow"),
    *(".gz", ".bz2", ".xz", ".zip", ".zst"),
}


@dataclass(frozen=True, slots=True, eq=False)
class CandleFile:
    """Bars of one series, a :class:`~kronos_connectors.replay.recordings.RecordedFile`."""

    only_series: Series
    table: CandleTable

    @classmethod
    def read(cls, spec: FileSpec) -> Self:
        """Read a file. Raises CandleFileError, also if the name of its series is not valid."""
        table = read_candles(spec.path, spec.timeframe)
        symbol = spec.symbol or symbol_of(spec.path)
        try:
            return cls(Series.of(spec.venue or DEFAULT_VENUE, symbol, table.timeframe), table)
        except ValueError as error:
            raise CandleFileError(f"{spec.path}: {error}; name it: SERIES={spec.path}") from None

    @property
    def path(self) -> Path:
        return self.table.path

    @property
    def series(self) -> frozenset[Series]:
        return frozenset((self.only_series,))

    @property
    def end(self) -> int:
        return self.only_series.timeframe.after(int(self.table.times[-1]))

    def start(self, bars: int) -> int:
        """See the protocol; gaps count as bars, as they are filled."""
        return self.only_series.timeframe.after(int(self.table.times[0]), bars - 1)

    def count(self, start: int) -> int:
        return len(self.table) - self._closed_count(start)

    def events(self, start: int) -> Iterator[Update]:
        after = self.only_series.timeframe.after
        for first in range(self._closed_count(start), len(self.table), _CHUNK):
            for candle in self._candles(first, first + _CHUNK):
                yield Update(self.only_series, candle, closed=True, received=after(candle.time))

    def history(self, series: Series, start: int, end: int, now: int) -> Sequence[Candle]:  # noqa: ARG002
        first, last = np.searchsorted(self.table.times, (start, end))
        return self._candles(int(first), min(int(last), self._closed_count(now)))

    def until(self, moment: int) -> Self | None:
        """Bars that close by ``moment``, UTC ms; None if there are none."""
        bars = self._closed_count(moment)
        if not bars:
            return None
        table = replace(self.table, times=self.table.times[:bars], values=self.table.values[:bars])
        return replace(self, table=table)

    def shifted(self, milliseconds: int) -> Self:
        """Bars moved to a later time."""
        return replace(self, table=replace(self.table, times=self.table.times + milliseconds))

    def _closed_count(self, now: int) -> int:
        """Number of bars closed by ``now``."""
        times, after = self.table.times, self.only_series.timeframe.after
        count = int(np.searchsorted(times, now))
        while count and after(int(times[count - 1])) > now:
            count -= 1
        return count

    def _candles(self, first: int, last: int) -> list[Candle]:
        table = self.table
        columns = 6 if table.has_amount else 5
        times, rows = table.times[first:last].tolist(), table.values[first:last, :columns].tolist()
        return [Candle(time, *row) for time, row in zip(times, rows, strict=True)]


def symbol_of(path: Path) -> str:
    """Symbol in a file name: ``ETH_BTC-5m.csv.gz`` → ETH/BTC; otherwise its stem."""
    name = path.name
    while Path(name).suffix.lower() in _SUFFIXES:
        name = Path(name).stem
    if match := re.fullmatch(r"(.+?)-\d+[smhdwM](-.*)?", name):
        name = match[1]
    base, *others = name.split("_")
    if len(others) in {1, 2}:
        return f"{base}/{':'.join(others)}"
    return name
