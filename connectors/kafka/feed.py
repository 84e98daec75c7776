"""Candle topics for role forecast, read as a member of a consumer group.

Checkpoints are the committed offsets of the group, with metadata.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from kronos_connectors.kafka.checks import Operation, candle_checks
from kronos_connectors.kafka.group_consumer import GroupOptions
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
    PartitionHandler,
    SeriesRemoved,
)
from kronos_stream.market.candle_message import CandleMessageError, RelayedBar, decode_bar
from kronos_stream.market.clock import Clock
from kronos_stream.market.timeframe import Timeframe

_MAX_CLOCK_SKEW_MS = 60_000


class KafkaFeed:
    """Bars of closed candles from a consumer group."""

    def __init__(
        self, options: KafkaOptions, needs: FeedNeeds, clock: Clock, random: Random
    ) -> None:
        self._options, self._needs, self._clock, self._random = options, needs, clock, random
        self._timeframes = {
            candle_topic(options.topic_prefix, one): one for one in needs.timeframes
        }
        self._session: GroupSession[FeedRecord] | None = None

    @property
    def group(self) -> str:
        """Name of the consumer group."""
        return self._options.group or f"{self._options.topic_prefix}-forecast"

    @property
    def iterations(self) -> int:
        return 0 if self._session is None else self._session.iterations

    @property
    def problem(self) -> str:
        return "not connected to kafka yet" if self._session is None else self._session.problem

    def checks(self, *, writes: bool) -> Sequence[Check]:
        operation: Operation = "Write" if writes else "Read"
        return candle_checks(self._options, self._needs.timeframes, operation)

    async def run(self, handler: PartitionHandler[FeedRecord]) -> None:
        group = GroupOptions(
            self.group,
            context_bars=2 * self._needs.lookback,  # records may be created late
            commit_interval=0.5,
            commit_timeout=5.0,
            sticky=True,
            check_topics=True,
        )
        self._session = GroupSession(
            self._options, group, handler, self._decode, self._clock, self._random
        )
        self._session.read_topics(self._timeframes)
        await self._session.run(lambda _: None)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _decode(self, partition: Partition, record: CandleRecord) -> FeedRecord:
        series = series_of_key(record.key or b"")
        try:
            if series is not None and ("ce_type", REMOVAL.encode()) in record.headers:
                decoded: RelayedBar | SeriesRemoved | None = SeriesRemoved(series)
            else:
                decoded = decode_bar(record.value or b"", series)
            if decoded is not None:
                _validate(decoded, self._timeframes[partition.log], record.timestamp)
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
