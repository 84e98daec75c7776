"""Feed interface: bars for role forecast, from partitioned logs that a group of daemons shares.

A feed assigns and revokes partitions; records of a partition have increasing offsets. The group's
progress is committed to the feed as a checkpoint per partition, where its next owner continues.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from kronos_stream.market.candle_message import RelayedBar
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe


class Partition(NamedTuple):
    """A partition of a log; all records of a series are in one partition."""

    log: str
    number: int


class Checkpoint(NamedTuple):
    """Committed progress of a partition, for its next owner."""

    offset: int
    """Offset of the first record that is not done."""
    metadata: str
    """Further progress as text, about 4,000 characters at most."""


class PartitionBounds(NamedTuple):
    """Offsets of a partition when it is assigned."""

    first: int
    """Offset of its first record."""
    end: int
    """Offset of the next record to be written."""
    context_start: int
    """Offset of the first record that is recent enough for a context that starts now."""
    checkpoint: Checkpoint | None


class SeriesRemoved(NamedTuple):
    """Series that is no longer relayed."""

    series: Series


class Unreadable(NamedTuple):
    """An invalid record: its series if known, the reason, and its value."""

    series: Series | None
    reason: str
    raw: bytes


FeedRecord: TypeAlias = RelayedBar | SeriesRemoved | Unreadable | None
"""Content of a record; None for one to ignore."""

_Record_contra = TypeVar("_Record_contra", contravariant=True)


class PartitionHandler(Protocol[_Record_contra]):
    """Callbacks of the daemon. All but :meth:`drain` return at once."""

    def paused(self) -> Collection[Partition]:
        """Partitions not to read from at present."""

    def on_assigned(self, partitions: Collection[Partition]) -> None:
        """Exactly these partitions are assigned now; :meth:`start_partition` follows for each."""

    def start_partition(self, partition: Partition, bounds: PartitionBounds) -> int:
        """Return the offset to start reading from."""

    def on_records(
        self, partition: Partition, records: Iterable[tuple[int, _Record_contra]], next_offset: int
    ) -> None:
        """Process records of a partition, in order, with their offsets."""

    async def drain(self) -> None:
        """Finish work in progress before all partitions are revoked; bounded in time."""

    def on_revoked(self) -> None:
        """No partition is assigned any more, or the assignment is unknown."""

    def pending_checkpoints(self) -> Mapping[Partition, Checkpoint]:
        """Checkpoints to commit, of partitions whose progress has changed."""

    def on_checkpointed(self, checkpoints: Mapping[Partition, Checkpoint]) -> None:
        """These checkpoints are committed."""

    def on_lag(self, lags: Mapping[str, int]) -> None:
        """Number of unread records in the assigned partitions, by log."""


class Feed(Protocol):
    """A member of a group that reads logs."""

    @property
    def iterations(self) -> int:
        """Increases while the feed works, even without records."""

    @property
    def problem(self) -> str:
        """Why nothing can be read or committed at present; empty if all is well."""

    async def run(self, handler: PartitionHandler[FeedRecord]) -> None:
        """Read until cancelled, reconnecting as needed."""

    async def close(self) -> None:
        """Commit, and leave the group so that others take over at once; bounded in time."""


class FeedNeeds(NamedTuple):
    """Bars that a feed has to provide."""

    timeframes: Sequence[Timeframe]
    lookback: int
    """Bars of a context."""


@dataclass(frozen=True, slots=True)
class FeedConnector:
    """Object of an entry point in the group ``kronos_stream.feeds``.

    Its settings are ``KRONOS_STREAM_<NAME>__<FIELD>``.
    """

    options: type[Any]
    """A pydantic model, every field with a default or a clear error."""
    build: Callable[[Any, FeedNeeds, Clock, Random], Feed]
