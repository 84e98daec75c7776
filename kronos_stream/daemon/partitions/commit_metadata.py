"""What is noted of a part beside its offset, as text: a broker takes 4,096 bytes of it.

``{"v":1,"start":1200,"bars":488,"done":"3-5,9"}``: to have contexts of 488 bars, read from 1200
on; the third to fifth and the ninth record after the noted offset are done with.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import orjson

_VERSION = 1
_MAX_LENGTH = 3_500
_MAX_DONE = 1_000_000


class CommitMetadata(NamedTuple):
    """What a note says."""

    rebuild_start: int
    """Offset from which contexts can be built."""
    lookback: int
    """How long these are."""
    done_offsets: set[int]
    """Offsets of records that are done with, beyond the noted one."""


def encode_metadata(metadata: CommitMetadata, base: int) -> str:
    """As text; what would make it too long is left out, and done again then.

    base: the noted offset.
    """
    pieces, length = [], 0
    for first, last in _runs(sorted(metadata.done_offsets)):
        piece = f"{first - base}" if first == last else f"{first - base}-{last - base}"
        length += len(piece) + 1
        if length > _MAX_LENGTH:
            break
        pieces.append(piece)
    text = {
        "v": _VERSION,
        "start": metadata.rebuild_start,
        "bars": metadata.lookback,
        "done": ",".join(pieces),
    }
    return orjson.dumps(text).decode()


def decode_metadata(text: str, base: int) -> CommitMetadata | None:
    """What :func:`write` wrote; None for anything else."""
    done: set[int] = set()
    try:
        said = orjson.loads(text)
        if said["v"] != _VERSION:
            return None
        start, bars = int(said["start"]), int(said["bars"])
        for run in filter(None, str(said["done"]).split(",")):
            first, _, last = run.partition("-")
            offsets = range(base + int(first), base + int(last or first) + 1)
            if len(offsets) + len(done) > _MAX_DONE:
                return None
            done.update(offsets)
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    if not 0 <= start <= base:
        return None
    return CommitMetadata(start, bars, done)


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    if not numbers:
        return
    first = numbers[0]
    for one, other in pairwise(numbers):
        if other != one + 1:
            yield first, one
            first = other
    yield first, numbers[-1]
