"""Candle topics for role forecast, read as a member of a consumer group.

Checkpoints are the committed offsets of the group, with metadata.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from random import Random

from kronos_connectors.kafka.checks import Operation, candle_checks
from kronos_connectors.kafka.group_handler import GroupOptions
from kronos_connectors.kafka.group_session import GroupSession
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.records import CandleRecord, check_timeframe, series_of_key, unreadable
from kronos_connectors.kafka.topics import candle_topic
from kronos_stream.forecast.message import REMOVAL
from kronos_stream.interfaces.diagnostics import Check
from kronos_stream.interfaces.feed import (
    FeedNeeds,
    FeedRecord,
    Partition,
    PartitionBounds,
    PartitionHandler,
    SeriesRemoved,
)
from kronos_stream.market.candle_message import CandleMessageError, RelayedBar, decode_bar
from kronos_stream.market.clock import Clock
from kronos_stream.market.timeframe import Timeframe

_COMMIT_INTERVAL_SECONDS, _COMMIT_TIMEOUT_SECONDS = 0.5, 5.0
_MAX_CLOCK_SKEW_MS = 60_000


class KafkaFeed:
    """Bars of closed candles from a consumer group."""

    def __init__(
        self, options: KafkaOptions, needs: FeedNeeds, clock: Clock, random: Random
    ) -> None:
        self._options, self._needs, self._clock, self._random = options, needs, clock, random
        self._group = options.group or f"{options.topic_prefix}-forecast"
        self._session: GroupSession | None = None

    @property
    def iterations(self) -> int:
        return 0 if self._session is None else self._session.iterations

    @property
    def problem(self) -> str:
        return "not connected to kafka yet" if self._session is None else self._session.problem

    def checks(self, *, writes: bool) -> Sequence[Check]:
        operation: Operation = "Write" if writes else "Read"
        return candle_checks(self._options, self._needs.timeframes, operation)

    async def run(self, handler: PartitionHandler) -> None:
        prefix, needs = self._options.topic_prefix, self._needs
        timeframes = {candle_topic(prefix, one): one for one in needs.timeframes}
        options = GroupOptions(
            self._group,
            2 * needs.lookback,  # records may be created late
            _COMMIT_INTERVAL_SECONDS,
            _COMMIT_TIMEOUT_SECONDS,
            sticky=True,
            check_topics=True,
        )
        self._session = GroupSession(
            self._options, options, _FeedHandler(handler, timeframes), self._clock, self._random
        )
        await self._session.run(lambda _: None)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


class _FeedHandler:
    """Decodes records for the daemon's handler."""

    def __init__(self, handler: PartitionHandler, timeframes: Mapping[str, Timeframe]) -> None:
        """timeframes: by topic."""
        self.timeframes, self.pending = timeframes, set[Partition]()
        self._handler = handler
        self.paused, self.drain, self.on_lag = handler.paused, handler.drain, handler.on_lag
        self.pending_checkpoints = handler.pending_checkpoints
        self.on_checkpointed = handler.on_checkpointed

    def on_assigned(self, partitions: Collection[Partition], counts: Mapping[str, int]) -> None:  # noqa: ARG002
        self.pending = set(partitions)
        self._handler.on_assigned(partitions)

    def on_revoked(self) -> None:
        self.pending.clear()
        self._handler.on_revoked()

    def start_partition(self, partition: Partition, bounds: PartitionBounds) -> int:
        self.pending.discard(partition)
        return self._handler.start_partition(partition, bounds)

    def on_records(
        self, partition: Partition, records: Sequence[CandleRecord], next_offset: int
    ) -> None:
        decoded = [(record.offset, self._decode(partition, record)) for record in records]
        self._handler.on_records(partition, decoded, next_offset)

    def _decode(self, partition: Partition, record: CandleRecord) -> FeedRecord:
        series = series_of_key(record.key or b"")
        try:
            if series is not None and ("ce_type", REMOVAL.encode()) in record.headers:
                decoded: RelayedBar | SeriesRemoved | None = SeriesRemoved(series)
            else:
                decoded = decode_bar(record.value or b"", series)
            if decoded is not None:
                _validate(decoded, self.timeframes[partition.log], record.timestamp)
        except CandleMessageError as error:
            return unreadable(partition, record, error)
        return decoded


def _validate(record: RelayedBar | SeriesRemoved, timeframe: Timeframe, created: int) -> None:
    """Raise CandleMessageError for an impossible record. created: its timestamp, UTC ms."""
    check_timeframe(record.series, timeframe)
    if isinstance(record, RelayedBar):
        ahead = timeframe.after(record.bar.candle.time) - created
        if ahead > _MAX_CLOCK_SKEW_MS:
            raise CandleMessageError(
                f"a bar that closes {ahead / 1000:.0f} s after it was written", record.series
            )


def build_feed(options: KafkaOptions, needs: FeedNeeds, clock: Clock, random: Random) -> KafkaFeed:
    """A feed; it connects when it runs."""
    return KafkaFeed(options, needs, clock, random)
