"""The topics: their names and what they must be like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kronos_connectors.kafka.options import KafkaOptions
from kronos_stream.interfaces.sink import RecordKind
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

_DAY_MS = 86_400_000
_MIN_CANDLE_BARS = 2 * 2_048
"""Bars of a candle topic that must be there: twice the longest context of any model."""


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic as it should be."""

    name: str
    partitions: int
    configs: dict[str, str] = field(hash=False)


def forecast_topic(prefix: str) -> str:
    """Every forecast."""
    return f"{prefix}.forecasts.v1"


def latest_topic(prefix: str) -> str:
    """The newest forecast of each series: compacted."""
    return f"{prefix}.forecasts.latest.v1"


def deadletter_topic(prefix: str) -> str:
    """What could not be taken in or sent out, and why."""
    return f"{prefix}.deadletter.v1"


def candle_topic(prefix: str, timeframe: Timeframe) -> str:
    """Closed bars of one timeframe."""
    return f"{prefix}.candles.{timeframe}.v1"


def timeframe_of(topic: str) -> str:
    """The timeframe whose candles a topic is for; empty if it is none of candles."""
    *_, kind, timeframe, version = ["", "", *topic.split(".")]
    return timeframe if (kind, version) == ("candles", "v1") else ""


def topics_for_record(prefix: str, kind: RecordKind, key: str) -> tuple[str, ...]:
    """To which topics a record goes. key: its series, empty for a dead letter without one."""
    if kind == "deadletter":
        return (deadletter_topic(prefix),)
    if kind == "candle":
        return (candle_topic(prefix, Series.parse(key).timeframe),)
    return forecast_topic(prefix), latest_topic(prefix)


def required_topics(options: KafkaOptions, timeframes: Sequence[Timeframe] = ()) -> list[TopicSpec]:
    """The topics that a daemon with these options writes to.

    Compression is left to the cluster: gzip by the broker adds 8 ms to 20 forecasts of 6 KB, lz4
    and zstd add 1 to 3 ms, but their readers in Python need a further package.
    """
    prefix, partitions = options.topic_prefix, options.partitions
    kept = round(options.retention_days * _DAY_MS)
    compacted = {
        "cleanup.policy": "compact",
        # Only closed segments are compacted; a reader of the topic should not wait for a week's.
        "segment.ms": "3600000",
        "min.cleanable.dirty.ratio": "0.1",
    }
    return [
        TopicSpec(forecast_topic(prefix), partitions, _retention_config(kept)),
        TopicSpec(latest_topic(prefix), partitions, compacted),
        TopicSpec(deadletter_topic(prefix), partitions, _retention_config(max(kept, 30 * _DAY_MS))),
        *(
            TopicSpec(
                candle_topic(prefix, timeframe),
                partitions,
                _retention_config(_candle_retention_ms(timeframe)),
            )
            for timeframe in timeframes
        ),
    ]


def _retention_config(milliseconds: int) -> dict[str, str]:
    return {"cleanup.policy": "delete", "retention.ms": str(milliseconds)}


def _candle_retention_ms(timeframe: Timeframe) -> int:
    bar = timeframe.milliseconds
    return -1 if bar is None else max(_MIN_CANDLE_BARS * bar, 7 * _DAY_MS)
