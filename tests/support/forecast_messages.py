"""Forecast messages with round numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kronos_stream.forecast.message import Forecast
from kronos_stream.market.utc import rfc3339

BTC, ETH = "binance:BTC/USDT:1m", "binance:ETH/USDT:1m"
MINUTE = 60_000
START = 1_718_709_300_000


def make_forecast_message(
    series: str = BTC,
    origin: int = START,
    *,
    bands: Sequence[str] = ("q05", "q50", "q95"),
    **fields: Any,
) -> Forecast:
    """A valid forecast of two bars; ``fields`` replace those of the message."""
    venue, symbol, timeframe = series.split(":")
    closes = {"mean": (7.0, 8.0), **{name: (1.0, float(name[1:])) for name in bands}}
    defaults: dict[str, Any] = {
        "schema": "kronos.forecast/1",
        "id": f"{series}/{origin}",
        "series": series,
        "venue": venue,
        "symbol": symbol,
        "timeframe": timeframe,
        "origin": rfc3339(origin),
        "revision": 0,
        "valid_until": rfc3339(origin + 2 * MINUTE),
        "created_at": rfc3339(origin + MINUTE),
        "degraded": False,
        "model": {"name": "nano", "revision": "1", "tokenizer": "nano"},
        "engine": {"version": "0.1.0", "device": "cpu", "dtype": "float32"},
        "sampling": {
            **dict.fromkeys(("temperature", "top_k", "top_p", "seed"), 1),
            "paths": 20,
            "anchor": True,
        },
        "context": {
            "bars": 96,
            "first": rfc3339(START),
            "synthetic": 0,
            "amount": "reported",
            "digest": "00",
        },
        "last": {"open": 1, "high": 1, "low": 1, "close": 42.5, "volume": 1},
        "times": [rfc3339(origin + MINUTE), rfc3339(origin + 2 * MINUTE)],
        **dict.fromkeys(("close", "open", "high", "low", "volume"), closes),
        "summary": {
            "p_up": 0.625,
            "expected_return": 0,
            "return_quantiles": {},
            "volatility": 0.00123,
            "value_at_risk_95": 0,
        },
        "repaired": 0,
        "latency_ms": {"close_to_received": 300, "queued": 1, "compute": 10},
    }
    return Forecast.model_validate({**defaults, **fields})
