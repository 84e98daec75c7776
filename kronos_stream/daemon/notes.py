"""What is noted of a part beside its offset, as text: short, for a broker takes 4,096 bytes of it.

``{"start":1200,"bars":488,"done":"3-5,9"}``: to have contexts of 488 bars, read from 1200 on; the
third to fifth and the ninth record after the noted offset are done with.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import orjson

_LONGEST = 3_500


class Kept(NamedTuple):
    """What a note says."""

    start: int
    """Offset from which contexts can be built."""
    bars: int
    """How long these are."""
    done: set[int]
    """Offsets of records that are done with, beyond the noted one."""


def write(kept: Kept, base: int) -> str:
    """As text; what would make it too long is left out, and done again then.

    base: the noted offset.
    """
    pieces, length = [], 0
    for first, last in _runs(sorted(kept.done)):
        piece = f"{first - base}" if first == last else f"{first - base}-{last - base}"
        length += len(piece) + 1
        if length > _LONGEST:
            break
        pieces.append(piece)
    text = {"start": kept.start, "bars": kept.bars, "done": ",".join(pieces)}
    return orjson.dumps(text).decode()


def parse(text: str, base: int) -> Kept | None:
    """What :func:`write` wrote; None for anything else."""
    try:
        said = orjson.loads(text)
        start, bars, runs = int(said["start"]), int(said["bars"]), str(said["done"])
        done: set[int] = set()
        for run in filter(None, runs.split(",")):
            first, _, last = run.partition("-")
            done.update(range(base + int(first), base + int(last or first) + 1))
    except (ValueError, KeyError, TypeError):
        return None
    return Kept(start, bars, done)


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
