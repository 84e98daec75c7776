"""Metadata committed beside the offset of a partition, as text of at most 4,096 bytes.

``{"v":1,"start":1200,"bars":488,"done":"3-5,9"}``: to rebuild contexts of 488 bars, read from
offset 1200; the third to fifth and the ninth record after the committed offset are done.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import orjson

_VERSION = 1
_MAX_LENGTH = 3_500
_MAX_DONE = 1_000_000


class CommitMetadata(NamedTuple):
    """Progress of a partition beyond its committed offset."""

    rebuild_start: int
    """Offset from which contexts can be rebuilt."""
    lookback: int
    """Bars of these contexts."""
    done_offsets: set[int]
    """Offsets after the committed one of records that are done."""


def encode_metadata(metadata: CommitMetadata, base: int) -> str:
    """Encode as text. Done offsets beyond its maximum length are omitted, to be done again.

    base: the committed offset.
    """
    runs, length = [], 0
    for first, last in _runs(sorted(metadata.done_offsets)):
        run = f"{first - base}" if first == last else f"{first - base}-{last - base}"
        length += len(run) + 1
        if length > _MAX_LENGTH:
            break
        runs.append(run)
    fields = {
        "v": _VERSION,
        "start": metadata.rebuild_start,
        "bars": metadata.lookback,
        "done": ",".join(runs),
    }
    return orjson.dumps(fields).decode()


def decode_metadata(text: str, base: int) -> CommitMetadata | None:
    """Decode the text of :func:`encode_metadata`; None for any other text."""
    done: set[int] = set()
    try:
        fields = orjson.loads(text)
        if fields["v"] != _VERSION:
            return None
        start, lookback = int(fields["start"]), int(fields["bars"])
        for run in filter(None, str(fields["done"]).split(",")):
            first, _, last = run.partition("-")
            offsets = range(base + int(first), base + int(last or first) + 1)
            if len(offsets) + len(done) > _MAX_DONE:
                return None
            done.update(offsets)
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    if not 0 <= start <= base:
        return None
    return CommitMetadata(start, lookback, done)


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        yield run[0], run[-1]
