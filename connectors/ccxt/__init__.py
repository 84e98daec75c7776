"""Exchanges of the package ccxt: candles watched over websockets, or polled by REST."""

from __future__ import annotations

from kronos_connectors.ccxt.options import CcxtOptions, build, venues
from kronos_stream.interfaces.source import SourceConnector

CONNECTOR = SourceConnector(CcxtOptions, build, venues)

__all__ = ["CONNECTOR", "CcxtOptions"]
