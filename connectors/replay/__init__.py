"""Recorded candles and websocket frames as a venue."""

from __future__ import annotations

from kronos_connectors.replay.options import ReplayOptions, build
from kronos_stream.interfaces.source import SourceConnector

CONNECTOR = SourceConnector(ReplayOptions, build)
