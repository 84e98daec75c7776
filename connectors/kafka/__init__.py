"""Kafka: candles in, forecasts out."""

from __future__ import annotations

from kronos_connectors.kafka.feed import build_feed
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.sink import build_relay, build_sink
from kronos_connectors.kafka.source import build_source
from kronos_stream.interfaces.feed import FeedConnector
from kronos_stream.interfaces.sink import RelayConnector, SinkConnector
from kronos_stream.interfaces.source import SourceConnector

SOURCE = SourceConnector(KafkaOptions, build_source)
SINK = SinkConnector(KafkaOptions, build_sink)
FEED = FeedConnector(KafkaOptions, build_feed)
RELAY = RelayConnector(KafkaOptions, build_relay)
