"""State of the candle topics that the source reads.

Each assigned partition has two stretches. Its records at assignment are history: a bounded number
of bars is read back into memory, from where requests for history are answered. Later records are
live and passed on. A partition that is assigned again continues where it stopped, unless it has
grown by more than the bounded history meanwhile.

Recovery does not depend on committed offsets: after a crash, history is read back, and the daemon
requests the bars that it lacks. Commits show the lag, and which records have been rejected already.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import structlog

from kronos_connectors._shared.bar_cache import RecentBars
from kronos_connectors.kafka.records import (
    CandleRecord,
    check_timeframe,
    series_of_key,
    unreadable,
)
from kronos_connectors.kafka.topics import candle_topic
from kronos_stream.interfaces.feed import Checkpoint, Partition, PartitionBounds, Unreadable
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.candle_message import CandleMessageError, decode_update
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

_log = structlog.get_logger()

_MAX_RECORDS_READ_BACK = 1_000_000
"""Limit per partition, for records of any age."""

DecodedRecord: TypeAlias = Update | Unreadable


@dataclass(slots=True)
class _Topic:
    timeframe: Timeframe
    followed: dict[bytes, Series] = field(default_factory=dict)
    """By name, which is the key of the records."""


@dataclass(slots=True)
class _PartitionProgress:
    next_offset: int
    """Offset of the next record to read."""
    history_end: int
    """Offset at which the history is complete."""
    live_from: int
    """First offset to pass on."""
    reject_from: int
    """First offset to reject."""
    committed: int

    @property
    def remaining(self) -> int:
        """Records of the history that are not read yet, at most."""
        return max(0, self.history_end - self.next_offset)


class _SavedProgress(NamedTuple):
    """Progress at the moment when a partition was revoked."""

    next_offset: int
    live_from: int
    reject_from: int
    reread: bool = False
    """Read the history again, for new series."""


class TopicState:
    """Topics, partitions and recent bars of the followed series. Times are UTC ms."""

    def __init__(
        self,
        prefix: str,
        bars: int,
        clock: Clock,
        *,
        emit: Callable[[DecodedRecord], None],
        partition_count: Callable[[str], int],
    ) -> None:
        """bars: kept of each series. emit: receives new updates and invalid records."""
        self._prefix, self._clock, self._emit = prefix, clock, emit
        self._partition_count = partition_count
        self._recent_bars = RecentBars(bars)
        self._topics: dict[str, _Topic] = {}
        self._assigned: set[Partition] = set()
        self._active: dict[Partition, _PartitionProgress] = {}
        self._saved: dict[Partition, _SavedProgress] = {}
        self._last_partition: dict[Series, Partition] = {}
        """Partition of the last record of each series."""

    # -- followed series -------------------------------------------------------------------

    @property
    def timeframes(self) -> Mapping[str, Timeframe]:
        return {name: topic.timeframe for name, topic in self._topics.items()}

    def follow(self, series: Collection[Series]) -> set[str]:
        """Follow exactly these series. Returns topics with a new one, which must start again."""
        topics: dict[str, _Topic] = {}
        for one in series:
            name = candle_topic(self._prefix, one.timeframe)
            topics.setdefault(name, _Topic(one.timeframe)).followed[one.name.encode()] = one
        restart = set[str]()
        for name, topic in topics.items():
            old = self._topics.get(name)
            if old is None or topic.followed.keys() - old.followed.keys():
                restart.add(name)
        for partition in [*self._active]:
            if partition.log in restart:
                self._save(partition)
        for partition, saved in self._saved.items():
            if partition.log in restart:
                self._saved[partition] = saved._replace(reread=True)
        self._topics = topics
        self._recent_bars.retain(series)
        kept = set(series)
        self._last_partition = {
            one: partition for one, partition in self._last_partition.items() if one in kept
        }
        return restart

    # -- assigned partitions ---------------------------------------------------------------

    def on_assigned(self, partitions: Collection[Partition]) -> None:
        self._assigned = set(partitions)
        if shared := self.shared_topics:
            _log.warning(
                "other members of the consumer group read these topics, too; if that is not "
                "intended, set KRONOS_STREAM_KAFKA__GROUP to a group of its own",
                topics=shared,
            )

    def on_revoked(self) -> None:
        self._assigned.clear()
        for partition in [*self._active]:
            self._save(partition)

    def paused(self) -> Collection[Partition]:
        return ()

    async def drain(self) -> None:
        """Nothing to do: records are passed on as they are read."""

    def on_lag(self, lags: Mapping[str, int]) -> None:
        """Nothing to do: the lag of the source shows in the committed offsets."""

    def _save(self, partition: Partition) -> None:
        at = self._active.pop(partition)
        live_from = max(at.next_offset, at.live_from)
        reject_from = max(at.next_offset, at.reject_from)
        self._saved[partition] = _SavedProgress(at.next_offset, live_from, reject_from)

    def start_partition(self, partition: Partition, bounds: PartitionBounds) -> int:
        first, end, start, checkpoint = bounds
        if start >= end:  # all records are older, or the broker does not search by time
            start = first
        start = max(first, end - _MAX_RECORDS_READ_BACK, start)
        committed = checkpoint.offset if checkpoint is not None else 0
        known = first <= committed <= end
        live_from, reject_from = end, committed if known else first
        saved = self._saved.pop(partition, None)
        if saved is not None and start <= saved.next_offset <= end:
            live_from, reject_from = saved.live_from, saved.reject_from
            start = start if saved.reread else saved.next_offset
        self._active[partition] = _PartitionProgress(
            start, end, live_from, reject_from, committed if known else 0
        )
        return start

    @property
    def shared_topics(self) -> Sequence[str]:
        """Topics of which other members of the group have partitions."""
        assigned = [partition.log for partition in self._assigned]
        return sorted(
            name for name in {*assigned} if assigned.count(name) < self._partition_count(name)
        )

    # -- records ---------------------------------------------------------------------------

    def on_records(
        self, partition: Partition, records: Iterable[tuple[int, CandleRecord]], next_offset: int
    ) -> None:
        at, topic = self._active.get(partition), self._topics.get(partition.log)
        if at is None or topic is None:
            return  # fetched before the start offset was known
        received = self._clock.now()
        for offset, record in records:
            if offset < at.next_offset:
                continue
            at.next_offset = offset + 1
            try:
                update = self._decode(topic, record, received)
            except CandleMessageError as error:
                if offset >= at.reject_from:
                    self._emit(unreadable(partition, record, error))
                continue
            if update is not None:
                self._last_partition[update.series] = partition
                if offset >= at.live_from:
                    self._emit(update)
        at.next_offset = max(at.next_offset, next_offset)

    def _decode(self, topic: _Topic, record: CandleRecord, received: int) -> Update | None:
        """Decode a record and remember a closed bar; None if its series is not followed.

        Raises CandleMessageError.
        """
        series = None
        if record.key:
            series = topic.followed.get(record.key)
            if series is None and (other := series_of_key(record.key)) is not None:
                check_timeframe(other, topic.timeframe)
                return None
        if record.value is None:
            raise CandleMessageError("a record without a value", series)
        update = decode_update(record.value, series, received)
        if update.series.name.encode() not in topic.followed:
            check_timeframe(update.series, topic.timeframe)
            return None
        candle = update.candle
        if update.closed:
            if (fault := candle.invalid_reason()) is not None:
                raise CandleMessageError(fault, update.series)
            if candle.time <= received:  # bars of the future would displace real ones
                self._recent_bars.add(update.series, candle)
        return update

    # -- history ---------------------------------------------------------------------------

    def unavailable_reason(self, series: Series, group: str) -> str:
        """Why the history of ``series`` is not available yet; empty if it is."""
        topic = candle_topic(self._prefix, series.timeframe)
        assigned = {one: at for one, at in self._active.items() if one.log == topic}
        if not assigned or any(one.log == topic for one in self._assigned - assigned.keys()):
            return f"{topic}: no partitions assigned yet in consumer group {group}"
        if remaining := sum(at.remaining for at in assigned.values()):
            return f"{topic}: {remaining:,} records are still to be read back"
        total = self._partition_count(topic)
        if len(assigned) < total and self._last_partition.get(series) not in assigned:
            return (
                f"{topic}: {len(assigned)} of its {total} partitions are assigned to us, and "
                f"{series} is in none of them; other members of group {group} have the rest"
            )
        return ""

    def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        """The bars with start <= open < end that have closed, ascending."""
        now, after = self._clock.now(), series.timeframe.after
        bars = self._recent_bars.between(series, start, end)
        return [candle for candle in bars if after(candle.time) <= now]

    # -- committed offsets -----------------------------------------------------------------

    def pending_checkpoints(self) -> dict[Partition, Checkpoint]:
        return {
            partition: Checkpoint(at.next_offset, "")
            for partition, at in self._active.items()
            if at.next_offset > at.committed
        }

    def on_checkpointed(self, checkpoints: Mapping[Partition, Checkpoint]) -> None:
        for partition, checkpoint in checkpoints.items():
            if (at := self._active.get(partition)) is not None:
                at.committed = checkpoint.offset
