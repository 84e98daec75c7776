"""MQTT: candles in, forecasts out."""

from __future__ import annotations

from kronos_connectors.mqtt.options import MqttOptions
from kronos_connectors.mqtt.sink import build_sink
from kronos_connectors.mqtt.source import build_source
from kronos_stream.interfaces.sink import SinkConnector
from kronos_stream.interfaces.source import SourceConnector

SOURCE = SourceConnector(MqttOptions, build_source)
SINK = SinkConnector(MqttOptions, build_sink)

__all__ = ["SINK", "SOURCE", "MqttOptions"]
