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

from kronos_connectors.kafka.topics import candles
from kronos_connectors.shelf import Shelf
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.wire import CandleMessageError, decode_update

_MOST_RECORDS = 1_000_000
"""Of a partition, read back at most, however long the time that is wanted of it."""


class Place(NamedTuple):
    """A partition."""

    topic: str
    partition: int


class Bounds(NamedTuple):
    """Offsets of a partition, as the brokers know them."""

    first: int
    end: int
    """Of the record that comes next."""
    since: int | None
    """Of the first record that is as young as :meth:`Reading.since` wants; None if none is."""
    committed: int | None
    """Where the group was, None if it never was there."""


class Taken(Protocol):
    """A record as a consumer gives it."""

    @property
    def offset(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...


class Rejected(NamedTuple):
    """A record that cannot be: its series if known, why, and its value."""

    series: Series | None
    reason: str
    raw: bytes


Told: TypeAlias = Update | Rejected


@dataclass(slots=True)
class _Topic:
    timeframe: Timeframe
    followed: dict[bytes, Series] = field(default_factory=dict)
    """By their name, which is the records' key."""


@dataclass(slots=True)
class _Partition:
    next: int
    """Offset of the first record that has not been read."""
    end: int
    """History is known from here on."""
    news: int
    """First offset to pass on."""
    judged: int
    """First offset to reject."""
    committed: int


class _Left(NamedTuple):
    """Where we were when a partition was taken from us."""

    next: int
    news: int
    judged: int
    anew: bool = False
    """Whether what came before is to be read back, for the sake of series that are new."""


class Reading:
    """All times are UTC ms, all offsets of records to be read next."""

    def __init__(self, prefix: str, bars: int) -> None:
        """prefix: of the topics' names. bars: of each series, to be read back and kept."""
        self._prefix, self._bars = prefix, bars
        self._shelf = Shelf(bars)
        self._topics: dict[str, _Topic] = {}
        self._partitions: dict[str, int] = {}
        """How many each topic has."""
        self._unplaced: set[Place] = set()
        self._reading: dict[Place, _Partition] = {}
        self._left: dict[Place, _Left] = {}
        self._seen: dict[Series, Place] = {}
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
            name = candles(self._prefix, one.timeframe)
            topics.setdefault(name, _Topic(one.timeframe)).followed[one.name.encode()] = one
        for name, topic in topics.items():
            old = self._topics.get(name)
            if old is None or topic.followed.keys() - old.followed.keys():
                self._read_back(name)
        self._topics = topics
        self._shelf.keep(series)
        self._seen = {one: place for one, place in self._seen.items() if one in set(series)}

    def _read_back(self, topic: str) -> None:
        again = {place for place in self._reading if place.topic == topic}
        self.revoked(again)
        self._unplaced |= again
        for place, left in self._left.items():
            if place.topic == topic:
                self._left[place] = left._replace(anew=True)

    # -- which partitions are ours, and where they begin -----------------------------------

    @property
    def unplaced(self) -> Collection[Place]:
        """Partitions that are ours; :meth:`begin` is to be told about them."""
        return frozenset(self._unplaced)

    def assigned(self, places: Iterable[Place], partitions: Mapping[str, int]) -> None:
        """These are ours. partitions: how many each topic has."""
        self._partitions = dict(partitions)
        self._unplaced |= set(places) - self._reading.keys()

    def revoked(self, places: Iterable[Place]) -> None:
        """These are no longer ours, or nobody knows."""
        for place in places:
            self._unplaced.discard(place)
            if (at := self._reading.pop(place, None)) is not None:
                news, judged = max(at.next, at.news), max(at.next, at.judged)
                self._left[place] = _Left(at.next, news, judged)

    def lost(self) -> None:
        """The brokers are gone, and with them every partition."""
        self.revoked([*self._unplaced, *self._reading])

    def since(self, place: Place, now: int) -> int:
        """How young a record must be at least to be read back.

        A record is made when its bar closes, or later, so none that is wanted is older.
        """
        return max(0, self._topics[place.topic].timeframe.after(now, -self._bars))

    def begin(self, place: Place, bounds: Bounds) -> int:
        """The offset to begin at."""
        first, end, since, committed = bounds
        start = max(first, end - _MOST_RECORDS, first if since is None else since)
        left = self._left.pop(place, None)
        known = committed if committed is not None and first <= committed <= end else None
        news, judged = end, first if known is None else known
        if left is not None and start <= left.next <= end:
            news, judged = left.news, left.judged
            start = start if left.anew else left.next
        self._unplaced.discard(place)
        self._reading[place] = _Partition(start, end, news, judged, known or 0)
        return start

    # -- records ---------------------------------------------------------------------------

    def take(self, place: Place, records: Iterable[Taken], received: int) -> list[Told]:
        """What records of a partition, in order, tell that is new."""
        at, topic = self._reading.get(place), self._topics.get(place.topic)
        if at is None or topic is None:
            return []  # fetched before it was known where to begin
        told: list[Told] = []
        for record in records:
            offset = record.offset
            if offset < at.next:
                continue
            at.next = offset + 1
            try:
                update = self._read(topic, record, received)
            except CandleMessageError as error:
                if offset >= at.judged:
                    reason = f"{place.topic}[{place.partition}]@{offset}: {error}"
                    told.append(Rejected(error.series, reason, record.value or b""))
                continue
            if update is not None:
                self._seen[update.series] = place
                if offset >= at.news:
                    told.append(update)
        return told

    def passed(self, place: Place, position: int) -> None:
        """The consumer is there: what it gave no records for is nothing to wait for."""
        if (at := self._reading.get(place)) is not None:
            at.next = max(at.next, position)

    def _read(self, topic: _Topic, record: Taken, received: int) -> Update | None:
        """What a record says, and on the shelf with it; None if it is of none of ours.

        Raises WireError.
        """
        series = None
        if record.key:
            series = topic.followed.get(record.key)
            if series is None and (other := _named(record.key)) is not None:
                _fits(other, topic)
                return None
        if record.value is None:
            raise CandleMessageError("a record without a value", series)
        update = decode_update(record.value, series, received)
        if update.series.name.encode() not in topic.followed:
            _fits(update.series, topic)
            return None
        candle = update.candle
        if update.closed:
            if (fault := candle.invalid_reason()) is not None:
                raise CandleMessageError(fault, update.series)
            if candle.time <= received:  # what opens only then would crowd out what is real
                self._shelf.put(update.series, candle)
        return update

    # -- history ---------------------------------------------------------------------------

    @property
    def behind(self) -> Collection[Place]:
        """Partitions whose history has not been read to its end."""
        return [place for place, at in self._reading.items() if _missing(at)]

    def lacks(self, series: Series, group: str) -> str:
        """Why the history of ``series`` cannot be told now: a clause for people, or nothing."""
        topic = candles(self._prefix, series.timeframe)
        ours = {place: at for place, at in self._reading.items() if place.topic == topic}
        if not ours or any(place.topic == topic for place in self._unplaced):
            return f"{topic}: its partitions are not ours yet, in the group {group}"
        if missing := sum(map(_missing, ours.values())):
            return f"{topic}: {missing:,} records are still to be read back"
        if len(ours) < self._partitions.get(topic, 0) and self._seen.get(series) not in ours:
            return (
                f"{topic}: {len(ours)} of its {self._partitions[topic]} partitions are ours, and "
                f"{series} is in none of them; other members of the group {group} have the rest"
            )
        return ""

    def history(self, series: Series, start: int, end: int, now: int) -> Sequence[Candle]:
        """The bars with start <= open < end that have closed, ascending."""
        bars = self._shelf.between(series, start, end)
        return [candle for candle in bars if series.timeframe.after(candle.time) <= now]

    # -- the group -------------------------------------------------------------------------

    @property
    def shared(self) -> Collection[str]:
        """Topics that others in the group read with us."""
        ours = [place.topic for place in {*self._reading, *self._unplaced}]
        return sorted(name for name in {*ours} if ours.count(name) < self._partitions.get(name, 0))

    def offsets(self) -> dict[Place, int]:
        """What is to be committed: how far we are beyond what was."""
        return {place: at.next for place, at in self._reading.items() if at.next > at.committed}

    def committed(self, offsets: Mapping[Place, int]) -> None:
        """The brokers know of these."""
        for place, offset in offsets.items():
            if (at := self._reading.get(place)) is not None:
                at.committed = offset


def _missing(at: _Partition) -> int:
    return max(0, at.end - at.next)


def _named(key: bytes) -> Series | None:
    """The series that a key is the name of, if it is one's."""
    try:
        return Series.parse(key.decode())
    except ValueError:
        return None


def _fits(series: Series, topic: _Topic) -> None:
    if series.timeframe != topic.timeframe:
        raise CandleMessageError(f"a bar of {series} among those of {topic.timeframe}", series)
