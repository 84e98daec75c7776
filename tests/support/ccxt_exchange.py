"""ccxt in virtual time, its Binance client connected to the simulated exchange."""

from __future__ import annotations

import asyncio
import time
from importlib import import_module
from typing import Any

import orjson
import pytest

from kronos_connectors.ccxt import CcxtOptions
from kronos_stream.testing.exchange import SimulatedExchange


def ccxt_options(exchange: SimulatedExchange, **more: Any) -> CcxtOptions:
    """Settings that connect ccxt's Binance client to ``exchange``."""
    urls = {
        "public": f"{exchange.rest_url}/api/v3",
        "fapiPublic": f"{exchange.rest_url}/fapi/v1",
        # ccxt recognizes spot by /stream in the URL, as in stream.binance.com.
        "ws": {"spot": f"{exchange.ws_url}/ws/stream", "linear": f"{exchange.ws_url}/ws"},
    }
    markets = {"fetchMarkets": {"types": ["spot", "linear"]}}
    config = {"binance": {"urls": {"api": urls}, "options": markets}}
    return CcxtOptions.model_validate({"config": orjson.dumps(config).decode(), **more})


def use_loop_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ccxt's rate limiter and pings use the event loop's time, which tests advance."""

    def now() -> float:
        try:
            return asyncio.get_running_loop().time()
        except RuntimeError:
            return time.time()

    monkeypatch.setattr(import_module("ccxt.async_support.base.throttler"), "time", now)
    exchange = import_module("ccxt.base.exchange").BaseExchange
    monkeypatch.setattr(exchange, "milliseconds", staticmethod(lambda: round(now() * 1000)))
