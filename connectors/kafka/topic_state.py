"""What has been read of the candle topics, and what it means: a pure machine.

Each partition is read twice over, so to speak. What it holds when it is handed to us is history: a
bounded stretch of it is read back and put on the shelf, where questions about the past are
answered from. What comes after that is news, and passed on. A partition that is handed to us again
goes on where we were, if what came meanwhile is no longer than such a stretch.

So nothing hangs on the group's committed offsets, and a crash at any moment loses nothing: after
it the past is read back, and whoever follows a series asks for the bars that it lacks. What is
committed tells of lag, and which records have been judged already.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

from kronos_connectors._shared.bar_cache import RecentBars
from kronos_connectors.kafka.topics import candle_topic
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.candle_message import CandleMessageError, decode_update
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

_MAX_RECORDS_READ_BACK = 1_000_000
"""Of a partition, read back at most, however long the time that is wanted of it."""


class Partition(NamedTuple):
    """A partition."""

    topic: str
    partition: int


class PartitionBounds(NamedTuple):
    """Offsets of a partition, as the brokers know them."""

    first: int
    end: int
    """Of the record that comes next."""
    since: int | None
    """Of the first record that is as young as :meth:`Reading.since` wants; None if none is."""
    committed: int | None
    """Where the group was, None if it never was there."""


class ConsumedRecord(Protocol):
    """A record as a consumer gives it."""

    @property
    def offset(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...


class InvalidRecord(NamedTuple):
    """A record that cannot be: its series if known, why, and its value."""

    series: Series | None
    reason: str
    raw: bytes


DecodedRecord: TypeAlias = Update | InvalidRecord


@dataclass(slots=True)
class _Topic:
    timeframe: Timeframe
    followed: dict[bytes, Series] = field(default_factory=dict)
    """By their name, which is the records' key."""


@dataclass(slots=True)
class _PartitionProgress:
    next_offset: int
    """Offset of the first record that has not been read."""
    history_end: int
    """History is known from here on."""
    live_from: int
    """First offset to pass on."""
    reject_from: int
    """First offset to reject."""
    committed: int


class _SavedProgress(NamedTuple):
    """Where we were when a partition was taken from us."""

    next_offset: int
    live_from: int
    reject_from: int
    reread: bool = False
    """Whether what came before is to be read back, for the sake of series that are new."""


class TopicState:
    """All times are UTC ms, all offsets of records to be read next."""

    def __init__(self, prefix: str, bars: int) -> None:
        """prefix: of the topics' names. bars: of each series, to be read back and kept."""
        self._prefix, self._bars = prefix, bars
        self._recent_bars = RecentBars(bars)
        self._topics: dict[str, _Topic] = {}
        self._partition_counts: dict[str, int] = {}
        """How many each topic has."""
        self._pending: set[Partition] = set()
        self._active: dict[Partition, _PartitionProgress] = {}
        self._saved: dict[Partition, _SavedProgress] = {}
        self._last_partition: dict[Series, Partition] = {}
        """Where a record of each series was read last."""

    # -- what is wanted --------------------------------------------------------------------

    @property
    def topics(self) -> frozenset[str]:
        """The topics to read."""
        return frozenset(self._topics)

    def follow(self, series: Collection[Series]) -> None:
        """Follow exactly these. Where one is new, the past of its topic is read back once more."""
        topics: dict[str, _Topic] = {}
        for one in series:
            name = candle_topic(self._prefix, one.timeframe)
            topics.setdefault(name, _Topic(one.timeframe)).followed[one.name.encode()] = one
        for name, topic in topics.items():
            old = self._topics.get(name)
            if old is None or topic.followed.keys() - old.followed.keys():
                self._reread(name)
        self._topics = topics
        self._recent_bars.retain(series)
        self._last_partition = {
            one: place for one, place in self._last_partition.items() if one in set(series)
        }

    def _reread(self, topic: str) -> None:
        again = {place for place in self._active if place.topic == topic}
        self.on_revoked(again)
        self._pending |= again
        for place, left in self._saved.items():
            if place.topic == topic:
                self._saved[place] = left._replace(reread=True)

    # -- which partitions are ours, and where they begin -----------------------------------

    @property
    def pending(self) -> Collection[Partition]:
        """Partitions that are ours; :meth:`begin` is to be told about them."""
        return frozenset(self._pending)

    def on_assigned(self, partitions: Iterable[Partition], counts: Mapping[str, int]) -> None:
        """These are ours. partitions: how many each topic has."""
        self._partition_counts = dict(counts)
        self._pending |= set(partitions) - self._active.keys()

    def on_revoked(self, partitions: Iterable[Partition]) -> None:
        """These are no longer ours, or nobody knows."""
        for place in partitions:
            self._pending.discard(place)
            if (at := self._active.pop(place, None)) is not None:
                news, judged = (
                    max(at.next_offset, at.live_from),
                    max(at.next_offset, at.reject_from),
                )
                self._saved[place] = _SavedProgress(at.next_offset, news, judged)

    def on_lost(self) -> None:
        """The brokers are gone, and with them every partition."""
        self.on_revoked([*self._pending, *self._active])

    def oldest_timestamp(self, partition: Partition, now: int) -> int:
        """How young a record must be at least to be read back.

        A record is made when its bar closes, or later, so none that is wanted is older.
        """
        return max(0, self._topics[partition.topic].timeframe.after(now, -self._bars))

    def begin(self, partition: Partition, bounds: PartitionBounds) -> int:
        """The offset to begin at."""
        first, end, since, committed = bounds
        start = max(first, end - _MAX_RECORDS_READ_BACK, first if since is None else since)
        left = self._saved.pop(partition, None)
        known = committed if committed is not None and first <= committed <= end else None
        news, judged = end, first if known is None else known
        if left is not None and start <= left.next_offset <= end:
            news, judged = left.live_from, left.reject_from
            start = start if left.reread else left.next_offset
        self._pending.discard(partition)
        self._active[partition] = _PartitionProgress(start, end, news, judged, known or 0)
        return start

    # -- records ---------------------------------------------------------------------------

    def read(
        self, partition: Partition, records: Iterable[ConsumedRecord], received_at: int
    ) -> list[DecodedRecord]:
        """What records of a partition, in order, tell that is new."""
        at, topic = self._active.get(partition), self._topics.get(partition.topic)
        if at is None or topic is None:
            return []  # fetched before it was known where to begin
        told: list[DecodedRecord] = []
        for record in records:
            offset = record.offset
            if offset < at.next_offset:
                continue
            at.next_offset = offset + 1
            try:
                update = self._decode(topic, record, received_at)
            except CandleMessageError as error:
                if offset >= at.reject_from:
                    reason = f"{partition.topic}[{partition.partition}]@{offset}: {error}"
                    told.append(InvalidRecord(error.series, reason, record.value or b""))
                continue
            if update is not None:
                self._last_partition[update.series] = partition
                if offset >= at.live_from:
                    told.append(update)
        return told

    def advance(self, partition: Partition, position: int) -> None:
        """The consumer is there: what it gave no records for is nothing to wait for."""
        if (at := self._active.get(partition)) is not None:
            at.next_offset = max(at.next_offset, position)

    def _decode(self, topic: _Topic, record: ConsumedRecord, received: int) -> Update | None:
        """What a record says, and on the shelf with it; None if it is of none of ours.

        Raises WireError.
        """
        series = None
        if record.key:
            series = topic.followed.get(record.key)
            if series is None and (other := _parse_series(record.key)) is not None:
                _check_timeframe(other, topic)
                return None
        if record.value is None:
            raise CandleMessageError("a record without a value", series)
        update = decode_update(record.value, series, received)
        if update.series.name.encode() not in topic.followed:
            _check_timeframe(update.series, topic)
            return None
        candle = update.candle
        if update.closed:
            if (fault := candle.invalid_reason()) is not None:
                raise CandleMessageError(fault, update.series)
            if candle.time <= received:  # what opens only then would crowd out what is real
                self._recent_bars.add(update.series, candle)
        return update

    # -- history ---------------------------------------------------------------------------

    @property
    def catching_up(self) -> Collection[Partition]:
        """Partitions whose history has not been read to its end."""
        return [place for place, at in self._active.items() if _remaining(at)]

    def unavailable_reason(self, series: Series, group: str) -> str:
        """Why the history of ``series`` cannot be told now: a clause for people, or nothing."""
        topic = candle_topic(self._prefix, series.timeframe)
        ours = {place: at for place, at in self._active.items() if place.topic == topic}
        if not ours or any(place.topic == topic for place in self._pending):
            return f"{topic}: its partitions are not ours yet, in the group {group}"
        if missing := sum(map(_remaining, ours.values())):
            return f"{topic}: {missing:,} records are still to be read back"
        if (
            len(ours) < self._partition_counts.get(topic, 0)
            and self._last_partition.get(series) not in ours
        ):
            return (
                f"{topic}: {len(ours)} of its {self._partition_counts[topic]} partitions are ours, and "
                f"{series} is in none of them; other members of the group {group} have the rest"
            )
        return ""

    def history(self, series: Series, start: int, end: int, now: int) -> Sequence[Candle]:
        """The bars with start <= open < end that have closed, ascending."""
        bars = self._recent_bars.between(series, start, end)
        return [candle for candle in bars if series.timeframe.after(candle.time) <= now]

    # -- the group -------------------------------------------------------------------------

    @property
    def shared_topics(self) -> Collection[str]:
        """Topics that others in the group read with us."""
        ours = [place.topic for place in {*self._active, *self._pending}]
        return sorted(
            name for name in {*ours} if ours.count(name) < self._partition_counts.get(name, 0)
        )

    def offsets_to_commit(self) -> dict[Partition, int]:
        """What is to be committed: how far we are beyond what was."""
        return {
            place: at.next_offset
            for place, at in self._active.items()
            if at.next_offset > at.committed
        }

    def on_committed(self, offsets: Mapping[Partition, int]) -> None:
        """The brokers know of these."""
        for place, offset in offsets.items():
            if (at := self._active.get(place)) is not None:
                at.committed = offset


def _remaining(at: _PartitionProgress) -> int:
    return max(0, at.history_end - at.next_offset)


def _parse_series(key: bytes) -> Series | None:
    """The series that a key is the name of, if it is one's."""
    try:
        return Series.parse(key.decode())
    except ValueError:
        return None


def _check_timeframe(series: Series, topic: _Topic) -> None:
    if series.timeframe != topic.timeframe:
        raise CandleMessageError(f"a bar of {series} among those of {topic.timeframe}", series)
