"""What a recording is made of, and how its files are named on a command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, Self

from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

DEFAULT_VENUE = "replay"
"""Of series that are not said to be another's."""


class InvalidFrame(NamedTuple):
    """A recorded frame that cannot be."""

    series: Series | None
    reason: str
    raw: bytes
    received: int
    """UTC ms."""


class RecordedFile(Protocol):
    """A file: what it tells, and when that was known. All times are UTC ms."""

    @property
    def path(self) -> Path: ...

    @property
    def series(self) -> frozenset[Series]: ...

    @property
    def end(self) -> int:
        """After this nothing is told."""

    def start(self, bars: int) -> int:
        """A moment after which there is a series that has ``bars`` bars at each close."""

    def count(self, start: int) -> int:
        """How many bars close, as far as is told, after ``start``."""

    def events(self, start: int) -> Iterator[Update | InvalidFrame]:
        """What became known after ``start``, in that order."""

    def history(self, series: Series, start: int, end: int, now: int) -> Sequence[Candle]:
        """The bars with start <= open < end that were known to be closed at ``now``."""


class FileSpec(NamedTuple):
    """A file to replay, and what is said of its series; empty or None where nothing is."""

    path: Path
    venue: str = ""
    symbol: str = ""
    timeframe: Timeframe | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``FILE`` or ``SERIES=FILE``, SERIES being [venue:]symbol[:timeframe]."""
        name, given, path = text.partition("=")
        if not given or Path(text).exists():
            return cls(Path(text))
        timeframe = None
        head, _, last = name.rpartition(":")
        if re.fullmatch(r"[1-9]\d{0,5}[smhdwM]", last):
            name, timeframe = head, Timeframe.parse(last)
        venue, _, symbol = name.partition(":")
        # BTC/USDT:USDT is a symbol: no venue has a slash.
        if not symbol or "/" in venue:
            venue, symbol = DEFAULT_VENUE, name
        return cls(Path(path), venue, symbol, timeframe)
