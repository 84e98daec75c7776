"""Kafka: forecasts out."""

from __future__ import annotations

from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.sink import build
from kronos_stream.forecast.sink import SinkConnector

SINK = SinkConnector(KafkaOptions, build)
