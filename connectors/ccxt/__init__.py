"""Exchanges of the package ccxt: candles watched over websockets, or polled by REST."""

from __future__ import annotations

from kronos_connectors.ccxt.connector import CONNECTOR
from kronos_connectors.ccxt.options import CcxtOptions

__all__ = ["CONNECTOR", "CcxtOptions"]
