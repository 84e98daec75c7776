"""Where role forecast gets its bars: logs in parts, which a group of daemons shares out.

A feed hands parts out and takes them back; records of a part have growing offsets. What a group has
done of a part is noted with the feed, so whoever gets it next knows where to go on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple, Protocol, TypeAlias

from kronos_stream.market.candle_message import RelayedBar
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe


class Partition(NamedTuple):
    """A partition of a log; all records of a series are in one part."""

    log: str
    number: int


class Checkpoint(NamedTuple):
    """What is noted of a part for whoever gets it next."""

    offset: int
    """Of the first record that is not done with."""
    metadata: str
    """Whatever else is worth knowing, at most some 4,000 characters."""


class PartitionBounds(NamedTuple):
    """A part, as its feed knows it when it is handed out."""

    first: int
    """Offset of its first record."""
    end: int
    """Offset that the next record will have."""
    context_start: int
    """Offset of the first record that is young enough to matter to a context that begins now."""
    checkpoint: Checkpoint | None


class SeriesRemoved(NamedTuple):
    """A series is given up."""

    series: Series


class Unreadable(NamedTuple):
    """A record that cannot be: its series if known, why, and what it says."""

    series: Series | None
    reason: str
    raw: bytes


FeedRecord: TypeAlias = RelayedBar | SeriesRemoved | Unreadable | None
"""What a record says; None: nothing to us."""


class PartitionHandler(Protocol):
    """The daemon's side of a feed. Every call but :meth:`give_up` returns at once."""

    def paused(self) -> Collection[Partition]:
        """Parts of which no more should be read just now."""

    def on_assigned(self, partitions: Collection[Partition]) -> None:
        """Exactly these parts are ours from now on; :meth:`begin` comes for each."""

    def start_partition(self, partition: Partition, bounds: PartitionBounds) -> int:
        """The offset to read ``part`` from."""

    def on_records(
        self, partition: Partition, records: Iterable[tuple[int, FeedRecord]], next_offset: int
    ) -> None:
        """Take in records of a part, in order, with their offsets; ``reached`` comes next."""

    async def drain(self) -> None:
        """All parts are about to be taken: finish what is in hand; bounded."""

    def on_revoked(self) -> None:
        """No part is ours any more, or nobody knows."""

    def pending_checkpoints(self) -> Mapping[Partition, Checkpoint]:
        """What is to be noted, where it has changed."""

    def on_checkpointed(self, checkpoints: Mapping[Partition, Checkpoint]) -> None:
        """These are safe."""

    def on_lag(self, lags: Mapping[str, int]) -> None:
        """By log: how many records of our parts are not read yet."""


class Feed(Protocol):
    """A member of a group that reads logs."""

    iterations: int
    """Grows while it works, whether there is something to read or not."""

    @property
    def problem(self) -> str:
        """Why nothing can be read or noted just now, in words; empty if all is well."""

    async def run(self, handler: PartitionHandler) -> None:
        """Read until cancelled, reconnecting by itself."""

    async def close(self) -> None:
        """Note what is done, and leave the group, so that others need not wait; bounded."""


class FeedNeeds(NamedTuple):
    """What is to be read."""

    timeframes: Sequence[Timeframe]
    lookback: int
    """How many a context has."""


@dataclass(frozen=True, slots=True)
class FeedConnector:
    """What an entry point of the group ``kronos_stream.feeds`` names.

    Its settings are ``KRONOS_STREAM_<NAME>__<FIELD>``.
    """

    options: type[Any]
    """A pydantic model, every field with a default or a clear error."""
    build: Callable[[Any, FeedNeeds, Clock, Random], Feed]
