"""Names and configuration of the topics."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from kronos_connectors.kafka.options import KafkaOptions
from kronos_stream.interfaces.sink import RecordKind
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

_DAY_MS = 86_400_000
_MIN_CANDLE_BARS = 2 * 2_048
"""Bars that candle topics retain: twice the longest context of any model."""


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """Required configuration of a topic."""

    name: str
    partitions: int
    configs: dict[str, str] = field(hash=False)


def forecast_topic(prefix: str) -> str:
    """Topic of all forecasts."""
    return f"{prefix}.forecasts.v1"


def latest_topic(prefix: str) -> str:
    """Compacted topic of the newest forecast of each series."""
    return f"{prefix}.forecasts.latest.v1"


def deadletter_topic(prefix: str) -> str:
    """Topic of invalid input and refused records, with the reasons."""
    return f"{prefix}.deadletter.v1"


def candle_topic(prefix: str, timeframe: Timeframe) -> str:
    """Topic of the closed bars of a timeframe."""
    return f"{prefix}.candles.{timeframe}.v1"


def timeframe_of(topic: str) -> str:
    """Timeframe of a candle topic; empty for any other topic."""
    *_, kind, timeframe, version = ["", "", *topic.split(".")]
    return timeframe if (kind, version) == ("candles", "v1") else ""


def missing_topics_message(topics: Collection[str]) -> str:
    """Error text for missing topics."""
    names = sorted(topics)
    return f"no topic {', '.join(names)}, or no right to see it; {create_remedy(names)}"


def create_remedy(topics: Sequence[str]) -> str:
    """The command that creates missing topics, as a remedy."""
    timeframes = ",".join(filter(None, map(timeframe_of, topics)))
    option = f" --candles {timeframes}" if timeframes else ""
    return f"to create it: kronos-stream topics create{option}"


def topics_for_record(prefix: str, kind: RecordKind, key: str) -> tuple[str, ...]:
    """Topics of a record. key: its series; may be empty for dead letters."""
    if kind == "deadletter":
        return (deadletter_topic(prefix),)
    if kind == "candle":
        return (candle_topic(prefix, Series.parse(key).timeframe),)
    return forecast_topic(prefix), latest_topic(prefix)


def required_topics(options: KafkaOptions, timeframes: Sequence[Timeframe] = ()) -> list[TopicSpec]:
    """Topics of a daemon with these options, and candle topics of ``timeframes``.

    Compression is left to the cluster: gzip by the broker adds 8 ms to 20 forecasts of 6 KB, lz4
    and zstd add 1 to 3 ms, but readers in Python then need another package.
    """
    prefix, partitions = options.topic_prefix, options.partitions
    kept = round(options.retention_days * _DAY_MS)
    compacted = {
        "cleanup.policy": "compact",
        # Only closed segments are compacted; a segment of a week would delay readers.
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
