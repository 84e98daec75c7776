"""A simulated exchange that speaks Binance's protocol, with faults on request."""

from __future__ import annotations

from kronos_stream.testing.exchange.faults import PRESETS, Faults, FaultsError, PlannedFault
from kronos_stream.testing.exchange.server import ExchangeError, SimulatedExchange

__all__ = ["PRESETS", "ExchangeError", "Faults", "FaultsError", "PlannedFault", "SimulatedExchange"]
