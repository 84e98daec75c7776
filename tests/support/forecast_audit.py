"""Audit of a topic of forecasts against the bars that should be forecast."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import orjson
from confluent_kafka import Consumer, TopicPartition

from kronos_stream.forecast.message import REMOVAL, Forecast, same_forecast
from kronos_stream.market.series import Series
from tests.support.processes import WAIT_SECONDS

ForecastKey = tuple[str, int, int]
"""Series, origin (UTC ms) and revision."""


def read_topic(bootstrap: str, topic: str) -> list[tuple[str, bytes]]:
    """Read all present records, key and value (empty for none), in order per partition.

    Raises confluent_kafka.KafkaException or TimeoutError.
    """
    consumer = Consumer(
        {"bootstrap.servers": bootstrap, "group.id": "audit", "enable.auto.commit": False}
    )
    try:
        partitions = consumer.list_topics(topic, timeout=WAIT_SECONDS).topics[topic].partitions
        records: list[tuple[str, bytes]] = []
        for partition in sorted(partitions):
            first, end = consumer.get_watermark_offsets(
                TopicPartition(topic, partition), timeout=WAIT_SECONDS
            )
            consumer.assign([TopicPartition(topic, partition, first)])
            while first < end:
                message = consumer.poll(WAIT_SECONDS)
                if message is None:
                    raise TimeoutError(f"{topic}: {end - first} records missing")
                if message.error():
                    continue
                offset = message.offset()
                assert offset is not None
                first = offset + 1
                records.append(((message.key() or b"").decode(), message.value() or b""))
        return records
    finally:
        consumer.close()


@dataclass(frozen=True, slots=True)
class AuditReport:
    """Problems of a topic; correct if all lists are empty."""

    records: int = 0
    duplicates: int = 0
    """Records whose forecast came before; allowed."""
    missing: list[tuple[str, int]] = field(default_factory=list)
    """Bars without a forecast: series, open time."""
    out_of_order: list[ForecastKey] = field(default_factory=list)
    """Forecasts whose first record comes after a later forecast of their series."""
    inconsistent: list[ForecastKey] = field(default_factory=list)
    """Duplicates that differ from the first."""
    premature: list[ForecastKey] = field(default_factory=list)
    """Forecasts made before their origin closed."""

    @property
    def problems(self) -> list[object]:
        return [*self.missing, *self.out_of_order, *self.inconsistent, *self.premature]


def audit_forecasts(
    records: Iterable[tuple[str, bytes]], expected: Mapping[Series, Iterable[int]]
) -> AuditReport:
    """Compare ``records`` with the open times (UTC ms) of the bars that should be forecast."""
    number = duplicates = 0
    out_of_order, inconsistent, premature = [], [], []
    firsts: dict[ForecastKey, Forecast] = {}
    newest: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for key, value in records:
        if is_removal(value):
            continue
        number += 1
        forecast = Forecast.parse(value)
        origin, revision = _ms(forecast.origin.timestamp()), forecast.revision
        forecast_key = (forecast.series, origin, revision)
        if key != forecast.series:
            inconsistent.append(forecast_key)
        first = firsts.setdefault(forecast_key, forecast)
        if first is not forecast:
            duplicates += 1
            if not same_forecast(first, forecast):
                inconsistent.append(forecast_key)
            continue
        if (origin, revision) < newest[key]:
            out_of_order.append(forecast_key)
        newest[key] = max(newest[key], (origin, revision))
        closed = Series.parse(forecast.series).timeframe.after(origin)
        if _ms(forecast.created_at.timestamp()) < closed:
            premature.append(forecast_key)
    present = {(series, origin) for series, origin, _ in firsts}
    missing = [
        (series.name, opened)
        for series, opens in expected.items()
        for opened in opens
        if (series.name, opened) not in present
    ]
    return AuditReport(number, duplicates, missing, out_of_order, inconsistent, premature)


def is_removal(value: bytes) -> bool:
    """Return whether a record is the removal of a series."""
    return bool(orjson.loads(value).get("schema") == REMOVAL)


def _ms(seconds: float) -> int:
    return round(1000 * seconds)
