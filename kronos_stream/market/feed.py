"""Where role forecast gets its bars: logs in parts, which a group of daemons shares out.

A feed hands parts out and takes them back; records of a part have growing offsets. What a group has
done of a part is noted with the feed, so whoever gets it next knows where to go on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple, Protocol, TypeAlias

from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.wire import Relayed


class Part(NamedTuple):
    """A partition of a log; all records of a series are in one part."""

    log: str
    number: int


class Note(NamedTuple):
    """What is noted of a part for whoever gets it next."""

    offset: int
    """Of the first record that is not done with."""
    text: str
    """Whatever else is worth knowing, at most some 4,000 characters."""


class Extent(NamedTuple):
    """A part, as its feed knows it when it is handed out."""

    first: int
    """Offset of its first record."""
    end: int
    """Offset that the next record will have."""
    since: int
    """Offset of the first record that is young enough to matter to a context that begins now."""
    note: Note | None


class Gone(NamedTuple):
    """A series is given up."""

    series: Series


class Unreadable(NamedTuple):
    """A record that cannot be: its series if known, why, and what it says."""

    series: Series | None
    reason: str
    raw: bytes


Told: TypeAlias = Relayed | Gone | Unreadable | None
"""What a record says; None: nothing to us."""


class Reader(Protocol):
    """The daemon's side of a feed. Every call but :meth:`give_up` returns at once."""

    def enough(self) -> Collection[Part]:
        """Parts of which no more should be read just now."""

    def given(self, parts: Collection[Part]) -> None:
        """Exactly these parts are ours from now on; :meth:`begin` comes for each."""

    def begin(self, part: Part, extent: Extent) -> int:
        """The offset to read ``part`` from."""

    def read(self, part: Part, records: Iterable[tuple[int, Told]], reached: int) -> None:
        """Take in records of a part, in order, with their offsets; ``reached`` comes next."""

    async def give_up(self) -> None:
        """All parts are about to be taken: finish what is in hand; bounded."""

    def taken(self) -> None:
        """No part is ours any more, or nobody knows."""

    def notes(self) -> Mapping[Part, Note]:
        """What is to be noted, where it has changed."""

    def noted(self, notes: Mapping[Part, Note]) -> None:
        """These are safe."""

    def lags(self, lags: Mapping[str, int]) -> None:
        """By log: how many records of our parts are not read yet."""


class Feed(Protocol):
    """A member of a group that reads logs."""

    turns: int
    """Grows while it works, whether there is something to read or not."""

    @property
    def trouble(self) -> str:
        """Why nothing can be read or noted just now, in words; empty if all is well."""

    async def run(self, reader: Reader) -> None:
        """Read until cancelled, reconnecting by itself."""

    async def close(self) -> None:
        """Note what is done, and leave the group, so that others need not wait; bounded."""


class FeedNeeds(NamedTuple):
    """What is to be read."""

    timeframes: Sequence[Timeframe]
    bars: int
    """How many a context has."""


@dataclass(frozen=True, slots=True)
class FeedConnector:
    """What an entry point of the group ``kronos_stream.feeds`` names.

    Its settings are ``KRONOS_STREAM_<NAME>__<FIELD>``.
    """

    options: type[Any]
    """A pydantic model, every field with a default or a clear error."""
    build: Callable[[Any, FeedNeeds, Clock, Random], Feed]
