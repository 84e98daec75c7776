"""Candle topics for role forecast: a member of a consumer group, and what it notes with the group.

Here is what talks to the brokers; what is read and what is done is the reader's
(:mod:`kronos_stream.market.feed`). Notes are the group's committed offsets and their metadata.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from random import Random
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata

from kronos_connectors.kafka import member
from kronos_connectors.kafka.chatter import listen
from kronos_connectors.kafka.checks import Right, checks_of_candles
from kronos_connectors.kafka.member import ANSWER_SECONDS
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.reasons import fault
from kronos_connectors.kafka.topics import candles
from kronos_stream.checkup import Check
from kronos_stream.forecast.message import REMOVAL
from kronos_stream.market.clock import Clock
from kronos_stream.market.feed import (
    Extent,
    FeedNeeds,
    Gone,
    Note,
    Part,
    Reader,
    Told,
    Unreadable,
)
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.wire import WireError, relayed

_log = structlog.get_logger()

_POLL_MS, _POLL_RECORDS = 200, 500
_NOTE_SECONDS, _NOTE_PATIENCE_SECONDS = 0.5, 5.0
_CLOSE_SECONDS = 2.0
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, _HEALTHY_SECONDS = 0.5, 30.0, 60.0


class _NoTopic(Exception):  # noqa: N818
    """A topic is not there."""


class KafkaFeed:
    """One consumer at a time, replaced whenever there is doubt about it."""

    def __init__(
        self, options: KafkaOptions, needs: FeedNeeds, clock: Clock, random: Random
    ) -> None:
        self.trouble = "not connected to kafka yet"
        """Why nothing can be read just now, in words; empty if all is well."""
        self._options, self._needs, self._clock, self._random = options, needs, clock, random
        self._topics = {candles(options.topic_prefix, one): one for one in needs.timeframes}
        self._group = options.group or f"{options.topic_prefix}-forecast"
        self._chatter = listen()
        self._consumer: AIOKafkaConsumer | None = None
        self._reader: Reader | None = None
        self._series: dict[bytes, Series | None] = {}
        """By key: what it is the name of."""
        self._unbegun: set[Part] = set()
        self._reached: dict[Part, int] = {}

    def checks(self, *, writes: bool) -> Sequence[Check]:
        right: Right = "Write" if writes else "Read"
        return checks_of_candles(self._options, self._needs.timeframes, right)

    async def run(self, reader: Reader) -> None:
        """Read until cancelled, reconnecting by itself."""
        self._reader, tries = reader, 0
        while True:
            began = self._now()
            try:
                await self._read(reader)
            except _NoTopic as error:
                self._complain(str(error))
            except Exception as error:  # noqa: BLE001 - whatever it was, a new consumer begins anew
                if not isinstance(error, (KafkaError, OSError)):  # a timeout is an OSError, too
                    _log.exception("unexpected failure of the kafka consumer")
                silence = f"no answer in {ANSWER_SECONDS:g} s"
                self._complain(str(fault(error, self._chatter, self._options, silence=silence)))
            await self._let_go(reader)
            tries = 0 if self._now() - began > _HEALTHY_SECONDS else tries + 1
            await self._clock.sleep(self._pause(tries))

    async def close(self) -> None:
        """Note what is done, and leave the group, so that others need not wait; bounded."""
        consumer, self._consumer = self._consumer, None
        if consumer is None or self._reader is None:
            return
        await self._note(consumer, self._reader)
        await member.end(consumer)

    # -- one consumer ----------------------------------------------------------------------

    async def _read(self, reader: Reader) -> None:
        """Read for ever. Raises _NoTopic, KafkaError or OSError."""
        self._chatter.forget()
        consumer = self._consumer = member.make_sharing(self._options, self._group)
        async with asyncio.timeout(ANSWER_SECONDS):
            await consumer.start()
            there = await consumer.topics()
        if missing := sorted(self._topics.keys() - there):
            lacking = ",".join(str(self._topics[name]) for name in missing)
            raise _NoTopic(
                f"no topic {', '.join(missing)}, or no right to see it; to create it: "
                f"kronos-stream topics create --candles {lacking}"
            )
        consumer.subscribe(sorted(self._topics), listener=_Listener(self, consumer, reader))
        pulse, note_at = member.Pulse(self._now()), self._now()
        while True:
            if self._unbegun:
                await self._begin(consumer, reader)
            wanted = _choose(consumer, reader)
            await self._take(consumer, reader)
            if wanted:
                pulse.check(consumer, self._now())
            else:  # no broker is asked for records
                pulse = member.Pulse(self._now())
            if self._now() >= note_at:
                self._tell_lags(consumer, reader)
                done = await self._note(consumer, reader)
                note_at = self._now() + (1 if done else 10) * _NOTE_SECONDS
            await asyncio.sleep(0)  # records that wait already must not starve the others

    def assigned(self, parts: Collection[Part]) -> None:
        """The group has given us these, and no others."""
        self._unbegun = set(parts)
        self._reached.clear()

    async def _begin(self, consumer: AIOKafkaConsumer, reader: Reader) -> None:
        """Look up where parts begin that are ours since just now."""
        places = [TopicPartition(*part) for part in sorted(self._unbegun)]
        async with asyncio.timeout(ANSWER_SECONDS):
            firsts = await consumer.beginning_offsets(places)
            ends = await consumer.end_offsets(places)
            since = await consumer.offsets_for_times({one: self._since(one) for one in places})
            notes = await self._noted(places)
        back = 0
        for place in places:
            part = Part(*place)
            if part not in self._unbegun or place not in consumer.assignment():
                continue  # taken from us meanwhile
            young, note = since.get(place), notes.get(place)
            extent = Extent(
                firsts[place],
                ends[place],
                ends[place] if young is None else young.offset,
                None if note is None or note.offset < 0 else Note(note.offset, note.metadata),
            )
            start = self._reached[part] = reader.begin(part, extent)
            consumer.seek(place, start)
            self._unbegun.discard(part)
            back += extent.end - start
        self.trouble = ""
        self._chatter.forget()
        _log.info("reads candle topics", partitions=len(places), records_back=back)

    async def _noted(self, places: Sequence[TopicPartition]) -> dict[Any, OffsetAndMetadata]:
        admin = AIOKafkaAdminClient(**self._options.connection())
        try:
            await admin.start()
            return dict(await admin.list_consumer_group_offsets(self._group, partitions=places))
        finally:
            with suppress(KafkaError, OSError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await admin.close()

    async def _take(self, consumer: AIOKafkaConsumer, reader: Reader) -> None:
        """Wait a moment for records, and pass them on."""
        try:
            # While the group shares out anew, aiokafka waits for that without end.
            async with asyncio.timeout(2 * _POLL_MS / 1000):
                batches = await consumer.getmany(timeout_ms=_POLL_MS, max_records=_POLL_RECORDS)
        except TimeoutError:
            return
        for place, records in batches.items():
            part, timeframe = Part(*place), self._topics[place.topic]
            reached = self._reached[part] = records[-1].offset + 1
            reader.read(
                part, [(one.offset, self._told(timeframe, one)) for one in records], reached
            )

    def _told(self, timeframe: Timeframe, record: ConsumerRecord[bytes, bytes]) -> Told:
        """What a record says."""
        series = self._named(record.key or b"")
        value = record.value or b""
        try:
            if ("ce_type", REMOVAL.encode()) in record.headers and series is not None:
                return Gone(series)
            told = relayed(value, series)
            if told is not None and told.series.timeframe != timeframe:
                raise WireError(f"a bar of {told.series} among those of {timeframe}", series)  # noqa: TRY301
        except WireError as error:
            where = f"{record.topic}[{record.partition}]@{record.offset}"
            return Unreadable(error.series, f"{where}: {error}", value)
        return told

    def _named(self, key: bytes) -> Series | None:
        if key not in self._series:
            try:
                self._series[key] = Series.parse(key.decode())
            except ValueError:
                return None
        return self._series[key]

    def _tell_lags(self, consumer: AIOKafkaConsumer, reader: Reader) -> None:
        lags = dict.fromkeys(self._topics, 0)
        for part, reached in self._reached.items():
            with suppress(KafkaError, AssertionError):  # no longer ours
                end = consumer.highwater(TopicPartition(*part))
                lags[part.log] += max(0, (end or 0) - reached)
        reader.lags(lags)

    async def _note(self, consumer: AIOKafkaConsumer, reader: Reader) -> bool:
        """Commit what is done; False if that was not possible."""
        ours = consumer.assignment()
        notes = {part: note for part, note in reader.notes().items() if part in ours}
        if not notes:
            return True
        offsets = {TopicPartition(*part): (*note,) for part, note in notes.items()}
        try:
            async with asyncio.timeout(_NOTE_PATIENCE_SECONDS):
                await consumer.commit(offsets)
        except (KafkaError, OSError) as error:
            _log.debug("offsets not committed", why=str(error))
            return False
        reader.noted(notes)
        return True

    async def _let_go(self, reader: Reader) -> None:
        consumer, self._consumer = self._consumer, None
        self._unbegun.clear()
        self._reached.clear()
        await reader.give_up()
        reader.taken()
        if consumer is not None:
            await member.end(consumer)

    # -- small things ----------------------------------------------------------------------

    def _since(self, place: TopicPartition) -> int:
        """How young a record must be at least for a context that begins now, UTC ms.

        A record is made when its bar closes, or later, so none that is wanted is older; and whoever
        makes them may be behind.
        """
        timeframe = self._topics[place.topic]
        return max(0, timeframe.after(self._clock.now(), -2 * self._needs.bars))

    def _complain(self, why: str) -> None:
        if why != self.trouble:  # an outage is told of once
            _log.warning("candles cannot be read from kafka", why=why)
        self.trouble = why

    def _pause(self, tries: int) -> float:
        most = min(_SHORTEST_PAUSE_SECONDS * 2.0 ** min(tries, 10), _LONGEST_PAUSE_SECONDS)
        return most * self._random.uniform(0.5, 1.0)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _choose(consumer: AIOKafkaConsumer, reader: Reader) -> bool:
    """Have only those parts read of which more is wanted; whether there is any."""
    ours, enough = consumer.assignment(), {TopicPartition(*part) for part in reader.enough()}
    paused = consumer.paused()
    if more := (paused - enough) & ours:
        consumer.resume(*more)
    if less := (enough - paused) & ours:
        consumer.pause(*less)
    return not ours or bool(ours - enough)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """Tells what the group gives and takes; the group waits while what is in hand is finished."""

    def __init__(self, feed: KafkaFeed, consumer: AIOKafkaConsumer, reader: Reader) -> None:
        self._feed, self._consumer, self._reader = feed, consumer, reader

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        if any(True for _ in revoked):
            await self._reader.give_up()
            await self._feed._note(self._consumer, self._reader)  # noqa: SLF001
        self._feed.assigned(())
        self._reader.taken()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        parts = [Part(*place) for place in assigned]
        self._feed.assigned(parts)
        self._reader.given(parts)


def build_feed(options: KafkaOptions, needs: FeedNeeds, clock: Clock, random: Random) -> KafkaFeed:
    """A feed; it connects when it runs."""
    return KafkaFeed(options, needs, clock, random)
