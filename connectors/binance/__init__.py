"""Binance: spot and USD-M futures klines over websockets and REST."""

from __future__ import annotations

from kronos_connectors.binance.options import BinanceOptions
from kronos_connectors.binance.source import build
from kronos_stream.interfaces.source import SourceConnector

CONNECTOR = SourceConnector(BinanceOptions, build)

__all__ = ["CONNECTOR", "BinanceOptions"]
