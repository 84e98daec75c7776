"""The interface between a group session and what it reads for: the source or the feed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kronos_connectors.kafka.records import CandleRecord
from kronos_stream.interfaces.feed import Checkpoint, Partition, PartitionBounds
from kronos_stream.market.timeframe import Timeframe


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """Options of a membership; times are seconds."""

    group: str
    context_bars: int
    """Age of the oldest records that are read back, in bars."""
    commit_interval: float
    commit_timeout: float
    sticky: bool = False
    """Members keep as many partitions as they can in a rebalance."""
    check_topics: bool = False
    """Read nothing while a topic is missing."""


class GroupHandler(Protocol):
    """Processes the partitions of a session; see also ``PartitionHandler`` of the core.

    Every call but :meth:`drain` returns at once.
    """

    @property
    def timeframes(self) -> Mapping[str, Timeframe]:
        """Topics to read, and their timeframes; may change while the session runs."""

    @property
    def pending(self) -> Collection[Partition]:
        """Assigned partitions that :meth:`start_partition` has to be called for."""

    def on_assigned(self, partitions: Sequence[Partition], counts: Mapping[str, int]) -> None:
        """Exactly these partitions are assigned. counts: number of partitions by topic."""

    def start_partition(self, partition: Partition, bounds: PartitionBounds) -> int:
        """The offset to read ``partition`` from."""

    def on_records(
        self, partition: Partition, records: Sequence[CandleRecord], next_offset: int
    ) -> None:
        """Process records in order; reading continues at ``next_offset``."""

    def on_revoked(self) -> None:
        """No partition is assigned any more."""

    def pending_checkpoints(self) -> Mapping[Partition, Checkpoint]:
        """Checkpoints to commit."""

    def on_checkpointed(self, checkpoints: Mapping[Partition, Checkpoint]) -> None:
        """These checkpoints are committed."""

    def paused(self) -> Collection[Partition]:
        """Partitions that should not be read for now."""

    async def drain(self) -> None:
        """Finish pending work before all partitions are revoked; bounded."""

    def on_lag(self, lags: Mapping[str, int]) -> None:
        """Number of records not read yet, by topic."""
