"""Files of a recording, and their notation on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple, Protocol, Self

from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

DEFAULT_VENUE = "replay"
"""Venue of series for which none is given."""

received_at = attrgetter("received")
"""Key to order updates and invalid frames by their time of arrival."""


class InvalidFrame(NamedTuple):
    """A recorded frame that is not valid."""

    series: Series | None
    reason: str
    raw: bytes
    received: int
    """UTC ms."""


class RecordedFile(Protocol):
    """File of a recording. All times are UTC ms."""

    @property
    def path(self) -> Path: ...

    @property
    def series(self) -> frozenset[Series]: ...

    @property
    def end(self) -> int:
        """Time of the last event."""

    def start(self, bars: int) -> int:
        """Time after which some series has ``bars`` bars at each close."""

    def count(self, start: int) -> int:
        """Number of bars that are received closed after ``start``."""

    def events(self, start: int) -> Iterator[Update | InvalidFrame]:
        """Events received after ``start``, in order."""

    def history(self, series: Series, start: int, end: int, now: int) -> Sequence[Candle]:
        """Bars with start <= open < end that were received closed by ``now``, ascending."""


class FileSpec(NamedTuple):
    """File to replay and its series; empty or None where not given."""

    path: Path
    venue: str = ""
    symbol: str = ""
    timeframe: Timeframe | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``FILE`` or ``SERIES=FILE``, SERIES being [venue:]symbol[:timeframe]."""
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
