"""A simulated exchange with Binance's protocol and configurable faults."""

from __future__ import annotations

from kronos_stream.testing.exchange.faults import PRESETS, Faults, FaultsError, PlannedFault
from kronos_stream.testing.exchange.server import ExchangeError, SimulatedExchange

__all__ = ["PRESETS", "ExchangeError", "Faults", "FaultsError", "PlannedFault", "SimulatedExchange"]
