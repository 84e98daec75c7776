"""A simulated exchange that speaks Binance's protocol, with faults on request."""

from __future__ import annotations

from kronos_stream.testing.exchange.server import SimulatedExchange

__all__ = ["SimulatedExchange"]
