"""Kafka: candles in, forecasts out."""

from __future__ import annotations

from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.sink import build
from kronos_connectors.kafka.source import build_source
from kronos_stream.forecast.sink import SinkConnector
from kronos_stream.market.source import SourceConnector

SOURCE = SourceConnector(KafkaOptions, build_source)
SINK = SinkConnector(KafkaOptions, build)
