"""What is on a topic of forecasts, held against what should be there."""

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
    """All records there are now, key and value (empty for none), in order per partition.

    Raises confluent_kafka.KafkaException or TimeoutError.
    """
    consumer = Consumer(
        {"bootstrap.servers": bootstrap, "group.id": "audit", "enable.auto.commit": False}
    )
    try:
        places = consumer.list_topics(topic, timeout=WAIT_SECONDS).topics[topic].partitions
        records: list[tuple[str, bytes]] = []
        for partition in sorted(places):
            first, end = consumer.get_watermark_offsets(
                TopicPartition(topic, partition), timeout=WAIT_SECONDS
            )
            consumer.assign([TopicPartition(topic, partition, first)])
            while first < end:
                message = consumer.poll(WAIT_SECONDS)
                if message is None:
                    raise TimeoutError(f"{topic}: {end - first} records did not come")
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
    """What is wrong with a topic; all is well where the lists are empty."""

    records: int = 0
    duplicates: int = 0
    """Records whose forecast was there before; allowed."""
    missing: list[tuple[str, int]] = field(default_factory=list)
    """Bars without a forecast: series, open."""
    out_of_order: list[ForecastKey] = field(default_factory=list)
    """Forecasts that came for the first time after a later one of their series."""
    inconsistent: list[ForecastKey] = field(default_factory=list)
    """Duplicates that say something else than the first."""
    premature: list[ForecastKey] = field(default_factory=list)
    """Forecasts made before their origin had closed."""

    @property
    def problems(self) -> list[object]:
        return [*self.missing, *self.out_of_order, *self.inconsistent, *self.premature]


def audit_forecasts(
    records: Iterable[tuple[str, bytes]], expected: Mapping[Series, Iterable[int]]
) -> AuditReport:
    """Hold ``records`` against the bars that should be forecast, by their opens (UTC ms)."""
    number = duplicates = 0
    misordered, unequal, early = [], [], []
    firsts: dict[ForecastKey, Forecast] = {}
    newest: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for key, value in records:
        if is_removal(value):
            continue
        number += 1
        forecast = Forecast.parse(value)
        origin, revision = _ms(forecast.origin.timestamp()), forecast.revision
        place = (forecast.series, origin, revision)
        if key != forecast.series:
            unequal.append(place)
        first = firsts.setdefault(place, forecast)
        if first is not forecast:
            duplicates += 1
            if not same_forecast(first, forecast):
                unequal.append(place)
            continue
        if (origin, revision) < newest[key]:
            misordered.append(place)
        newest[key] = max(newest[key], (origin, revision))
        closed = Series.parse(forecast.series).timeframe.after(origin)
        if _ms(forecast.created_at.timestamp()) < closed:
            early.append(place)
    there = {(series, origin) for series, origin, _ in firsts}
    missing = [
        (series.name, opened)
        for series, opens in expected.items()
        for opened in opens
        if (series.name, opened) not in there
    ]
    return AuditReport(number, duplicates, missing, misordered, unequal, early)


def is_removal(value: bytes) -> bool:
    """Whether a record of the topic of forecasts says that its series is given up."""
    return bool(orjson.loads(value).get("schema") == REMOVAL)


def _ms(seconds: float) -> int:
    return round(1000 * seconds)
