"""Sample paths as Parquet in long form: one row per path and step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kronos_stream.atomic import atomic_write

METADATA_KEY = "kronos_stream"
"""Key of the settings, as JSON, in the file's metadata."""

_TIME = pa.timestamp("ms", tz="UTC")
_CANDLE = ("open", "high", "low", "close", "volume", "amount")
_SCHEMA = pa.schema(
    [
        ("series", pa.dictionary(pa.int32(), pa.string())),
        ("origin", _TIME),
        ("path", pa.int32()),
        ("step", pa.int32()),
        ("time", _TIME),
        *((name, pa.float32()) for name in _CANDLE),
    ]
)


class PathsWriter:
    """Appends blocks of paths, one row group each, so that memory holds one block at a time."""

    def __init__(
        self, writer: pq.ParquetWriter, series: str, origin: int, times: NDArray[np.int64]
    ) -> None:
        self._writer = writer
        self._series = series
        self._origin = origin
        self._times = times
        self._paths = 0

    def write(self, paths: NDArray[np.float32]) -> None:
        """Append ``paths`` (n, horizon, 6); their numbers continue those written before."""
        count, horizon, _ = paths.shape
        rows = count * horizon
        numbers = np.arange(self._paths, self._paths + count)
        steps = np.arange(1, horizon + 1)
        series = pa.DictionaryArray.from_arrays(
            pa.array(np.zeros(rows, np.int32)), pa.array([self._series])
        )
        columns = [
            series,
            pa.array(np.full(rows, self._origin), _TIME),
            pa.array(np.repeat(numbers, horizon), pa.int32()),
            pa.array(np.tile(steps, count), pa.int32()),
            pa.array(np.tile(self._times, count), _TIME),
            *(pa.array(column) for column in paths.reshape(rows, len(_CANDLE)).T),
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._writer.schema))
        self._paths += count


@contextmanager
def paths_writer(
    path: Path,
    *,
    series: str,
    origin: int,
    times: NDArray[np.int64],
    settings: Mapping[str, Any],
) -> Iterator[PathsWriter]:
    """Open ``path`` for sample paths; the file appears, complete, when the block succeeds.

    Columns: series, origin, path (from 0), step (from 1), time, open, high, low, close, volume,
    amount. ``origin`` and ``times`` (horizon,) are bar opens, UTC ms, stored as typed timestamps;
    ``settings`` is stored in the file's metadata.
    """
    schema = _SCHEMA.with_metadata({METADATA_KEY: json.dumps(settings)})
    with atomic_write(path) as part, pq.ParquetWriter(part, schema, compression="zstd") as writer:
        yield PathsWriter(writer, series, origin, times)
