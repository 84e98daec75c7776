"""A seat in a consumer group: one consumer, from joining to leaving, and what it is given.

While the group shares out anew, records are held back, and that may take as long as the slowest
member needs to hand over; else a broker that answers nothing for a while is taken for gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import structlog
from aiokafka import ConsumerRebalanceListener, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata

from kronos_connectors.kafka import group_consumer
from kronos_connectors.kafka.group_consumer import REQUEST_TIMEOUT_SECONDS
from kronos_connectors.kafka.options import KafkaOptions
from kronos_stream.forecast.message import REMOVAL
from kronos_stream.interfaces.feed import (
    Checkpoint,
    FeedNeeds,
    FeedRecord,
    Partition,
    PartitionBounds,
    PartitionHandler,
    SeriesRemoved,
    Unreadable,
)
from kronos_stream.market.candle_message import CandleMessageError, RelayedBar, decode_bar
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

_log = structlog.get_logger()

_POLL_MS, _POLL_RECORDS = 200, 500
_COMMIT_INTERVAL_SECONDS, _COMMIT_TIMEOUT_SECONDS = 0.5, 5.0
_COMMIT_FAILURES_BEFORE_WARNING = 3
"""So often noting may fail in a row before it is said."""
_REBALANCE_DEADLINE_SECONDS = 120.0
"""The group may take so long to share out anew."""
_TOPIC_CHECK_SECONDS = 60.0
"""How often it is looked whether the topics are still there."""
_CLOSE_TIMEOUT_SECONDS = 2.0
_MAX_CLOCK_SKEW_MS = 60_000
"""So far apart clocks may be."""


class TopicNotFound(Exception):  # noqa: N818
    """A topic is not there."""


class GroupSession:
    """See the module; :meth:`turns` once, then :meth:`leave` or :meth:`close`."""

    def __init__(
        self,
        options: KafkaOptions,
        group: str,
        topics: Mapping[str, Timeframe],
        needs: FeedNeeds,
        clock: Clock,
        handler: PartitionHandler,
    ) -> None:
        """topics: to read, and whose bars are in them."""
        self.ready = False
        """Whether the group has given us what is ours, and it is known where that begins."""
        self.commit_error: BaseException | None = None
        """Why what is done cannot be noted, for a while already."""
        self._options, self._group, self._topics = options, group, topics
        self._needs, self._clock, self._handler = needs, clock, handler
        self._consumer = group_consumer.create_sticky_consumer(options, group)
        self._series_by_key: dict[bytes, Series | None] = {}
        """By key: what it is the name of."""
        self._pending: set[Partition] = set()
        self._positions: dict[Partition, int] = {}
        self._end_offsets: dict[Partition, int] = {}
        self._commit_lock, self._commit_failures = asyncio.Lock(), 0

    async def poll(self) -> AsyncIterator[None]:
        """Read for ever; a turn is over now and then.

        Raises NoTopic, KafkaError or OSError.
        """
        consumer = self._consumer
        async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
            await consumer.start()
        await self._check_topics()
        consumer.subscribe(sorted(self._topics), listener=_RebalanceListener(self, self._handler))
        pulse, now = group_consumer.LivenessCheck(self._now()), self._now()
        note_at, look_at, shared_at = now, now + _TOPIC_CHECK_SECONDS, now
        while True:
            if now >= look_at:
                await self._check_topics()
                look_at = now + _TOPIC_CHECK_SECONDS
            if self._pending:
                await self._seek_to_start()
            wanted = self._apply_pauses()
            given, now = await self._poll_records(), self._now()
            if given:
                shared_at = now
            elif now - shared_at > _REBALANCE_DEADLINE_SECONDS:
                raise KafkaError(
                    f"the group has not shared out anew in {_REBALANCE_DEADLINE_SECONDS:g} s"
                )
            if given and wanted:
                pulse.check(consumer, now)
            else:  # no broker is asked for records
                pulse = group_consumer.LivenessCheck(now)
            if now >= note_at:
                self._report_lags()
                note_at = now + (1 if await self.commit() else 10) * _COMMIT_INTERVAL_SECONDS
            yield
            await asyncio.sleep(0)  # records that wait already must not starve the others

    async def drain_and_close(self) -> None:
        """Finish what is in hand, note it, and leave; bounded."""
        await self._handler.drain()
        await self.commit()
        self.on_revoked()
        await group_consumer.close_consumer(self._consumer)

    async def close(self) -> None:
        """Note what is done, and leave; bounded."""
        await self.commit()
        await group_consumer.close_consumer(self._consumer)

    # -- what is ours ----------------------------------------------------------------------

    def on_assigned(self, partitions: Sequence[Partition]) -> None:
        """The group has given us these, and no others; maybe none."""
        self._pending = set(partitions)
        self.ready = not partitions
        self._handler.on_assigned(partitions)

    def on_revoked(self) -> None:
        """Nothing is ours any more."""
        self.ready = False
        self._pending.clear()
        self._positions.clear()
        self._handler.on_revoked()

    async def _check_topics(self) -> None:
        async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
            there = await self._consumer.topics()
        if missing := sorted(self._topics.keys() - there):
            lacking = ",".join(str(self._topics[name]) for name in missing)
            raise TopicNotFound(
                f"no topic {', '.join(missing)}, or no right to see it; to create it: "
                f"kronos-stream topics create --candles {lacking}"
            )

    async def _seek_to_start(self) -> None:
        """Look up where parts begin that are ours since just now."""
        consumer = self._consumer
        places = [TopicPartition(*part) for part in sorted(self._pending)]
        async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
            firsts = await consumer.beginning_offsets(places)
            ends = await consumer.end_offsets(places)
            since = await consumer.offsets_for_times(
                {one: self._oldest_timestamp(one) for one in places}
            )
            notes = await self._fetch_committed(places)
        back = 0
        for place in places:
            part = Partition(*place)
            if part not in self._pending or place not in consumer.assignment():
                continue  # taken from us meanwhile
            young, note = since.get(place), notes[place]
            extent = PartitionBounds(
                firsts[place],
                ends[place],
                ends[place] if young is None else young.offset,
                None if note.offset < 0 else Checkpoint(note.offset, note.metadata),
            )
            start = self._positions[part] = self._handler.start_partition(part, extent)
            self._end_offsets[part] = extent.end
            consumer.seek(place, start)
            self._pending.discard(part)
            back += extent.end - start
        self.ready = not self._pending
        _log.info("reads candle topics", partitions=len(places), records_back=back)

    async def _fetch_committed(
        self, partitions: Sequence[TopicPartition]
    ) -> dict[Any, OffsetAndMetadata]:
        admin = AIOKafkaAdminClient(**self._options.client_arguments())
        try:
            await admin.start()
            notes = await admin.list_consumer_group_offsets(
                self._group, partitions=list(partitions)
            )
        finally:
            with suppress(KafkaError, OSError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_SECONDS):
                    await admin.close()
        # Whoever was asked is not in charge any more, or not yet; aiokafka does not tell.
        if set(partitions) - notes.keys():
            raise KafkaError(f"what the group {self._group} has done was not told")
        return dict(notes)

    def _oldest_timestamp(self, partition: TopicPartition) -> int:
        """How young a record must be at least for a context that begins now, UTC ms.

        A record is made when its bar closes, or later, so none that is wanted is older; and whoever
        makes them may be behind.
        """
        timeframe = self._topics[partition.topic]
        return max(0, timeframe.after(self._clock.now(), -2 * self._needs.lookback))

    # -- records ---------------------------------------------------------------------------

    def _apply_pauses(self) -> bool:
        """Have only those parts read of which more is wanted; whether there is any."""
        consumer = self._consumer
        ours = consumer.assignment()
        enough = {TopicPartition(*part) for part in self._handler.paused()}
        paused = consumer.paused()
        if more := (paused - enough) & ours:
            consumer.resume(*more)
        if less := (enough - paused) & ours:
            consumer.pause(*less)
        return bool(ours - enough)

    async def _poll_records(self) -> bool:
        """Wait a moment for records, and pass them on; False while the group shares out anew."""
        consumer = self._consumer
        try:
            # While the group shares out anew, aiokafka waits for that without end.
            async with asyncio.timeout(2 * _POLL_MS / 1000):
                batches = await consumer.getmany(timeout_ms=_POLL_MS, max_records=_POLL_RECORDS)
        except TimeoutError:
            return False
        for place, records in batches.items():
            timeframe = self._topics[place.topic]
            told = [(one.offset, self._decode(timeframe, one)) for one in records]
            self._dispatch(Partition(*place), told, records[-1].offset + 1)
        for part in [*self._positions]:
            place = TopicPartition(*part)
            if place not in batches and place in consumer.assignment():
                # Marks of transactions are no records, and are passed over.
                async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
                    self._dispatch(part, (), await consumer.position(place))
        return True

    def _dispatch(
        self, partition: Partition, records: Iterable[tuple[int, FeedRecord]], position: int
    ) -> None:
        if position > self._positions.get(partition, position):
            self._positions[partition] = position
            self._handler.on_records(partition, records, position)

    def _decode(self, timeframe: Timeframe, record: ConsumerRecord[bytes, bytes]) -> FeedRecord:
        """What a record says."""
        series = self._parse_series(record.key or b"")
        value = record.value or b""
        try:
            gone = ("ce_type", REMOVAL.encode()) in record.headers and series is not None
            told = SeriesRemoved(series) if gone and series else decode_bar(value, series)
            if told is not None:
                _validate(told, timeframe, record.timestamp)
        except CandleMessageError as error:
            where = f"{record.topic}[{record.partition}]@{record.offset}"
            return Unreadable(error.series, f"{where}: {error}", value)
        return told

    def _parse_series(self, key: bytes) -> Series | None:
        if key not in self._series_by_key:
            try:
                self._series_by_key[key] = Series.parse(key.decode())
            except ValueError:
                return None
        return self._series_by_key[key]

    # -- what is done ----------------------------------------------------------------------

    def _report_lags(self) -> None:
        if not self.ready:
            return
        lags = dict.fromkeys(self._topics, 0)
        for part, reached in self._positions.items():
            with suppress(KafkaError, AssertionError):  # no longer ours
                end = self._consumer.highwater(TopicPartition(*part)) or 0
                lags[part.log] += max(0, max(end, self._end_offsets[part]) - reached)
        self._handler.on_lag(lags)

    async def commit(self) -> bool:
        """Commit what is done; False if that was not possible. Bounded."""
        async with self._commit_lock:
            ours = self._consumer.assignment()
            notes = {
                part: note
                for part, note in self._handler.pending_checkpoints().items()
                if part in ours
            }
            if not notes:
                return True
            offsets = {TopicPartition(*part): (*note,) for part, note in notes.items()}
            try:
                async with asyncio.timeout(_COMMIT_TIMEOUT_SECONDS):
                    await self._consumer.commit(offsets)
            except (KafkaError, OSError) as error:
                self._commit_failures += 1
                if self._commit_failures == _COMMIT_FAILURES_BEFORE_WARNING:
                    _log.warning("offsets cannot be committed", why=repr(error))
                self.commit_error = (
                    error if self._commit_failures >= _COMMIT_FAILURES_BEFORE_WARNING else None
                )
                return False
            self._commit_failures, self.commit_error = 0, None
            self._handler.on_checkpointed(notes)
            return True

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _validate(record: RelayedBar | SeriesRemoved, timeframe: Timeframe, written_at: int) -> None:
    """Raises WireError. written: when the record was, UTC ms."""
    series = record.series
    if series.timeframe != timeframe:
        raise CandleMessageError(f"{series} among the series of {timeframe}", series)
    if isinstance(record, RelayedBar):
        ahead = timeframe.after(record.bar.candle.time) - written_at
        if ahead > _MAX_CLOCK_SKEW_MS:
            raise CandleMessageError(
                f"a bar that closes {ahead / 1000:.0f} s after it was written", series
            )


class _RebalanceListener(ConsumerRebalanceListener):  # type: ignore[misc]
    """Tells what the group gives and takes; the group waits while what is in hand is finished."""

    def __init__(self, session: GroupSession, handler: PartitionHandler) -> None:
        self._session, self._handler = session, handler

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        try:
            if any(True for _ in revoked):
                await self._handler.drain()
                await self._session.commit()
        except Exception:  # noqa: BLE001 - aiokafka would say nothing of it, and go on
            _log.exception("not handed over in good order")
        finally:
            self._session.on_revoked()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self._session.on_assigned([Partition(*place) for place in assigned])
