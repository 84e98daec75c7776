"""How to reach Binance: ``KRONOS_STREAM_BINANCE__*``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class BinanceOptions(BaseModel):
    """Public market data alone; no key is needed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    ws_url: str = Field(default="wss://data-stream.binance.vision", pattern=r"^wss?://\S+$")
    """Websockets of spot."""
    rest_url: str = Field(default="https://data-api.binance.vision", pattern=r"^https?://\S+$")
    """REST of spot."""
    futures_ws_url: str = Field(default="wss://fstream.binance.com/market", pattern=r"^wss?://\S+$")
    """Websockets of USD-M futures."""
    futures_rest_url: str = Field(default="https://fapi.binance.com", pattern=r"^https?://\S+$")
    """REST of USD-M futures."""
    weight_share: float = Field(default=0.75, gt=0, le=1)
    """Share of the request weight per minute that the venue allows an address."""
    streams_per_connection: int = Field(default=400, ge=1, le=1_024)
    """Klines per websocket; the venue allows 1,024."""
    timeout_seconds: float = Field(default=10.0, gt=0, le=120)
    """For a connection, or for an answer to begin."""
    stall_seconds: float = Field(default=10.0, gt=0, le=300)
    """A socket silent for so long is asked whether it lives."""
    lifetime_seconds: float = Field(default=82_800.0, ge=10, le=86_000)
    """A socket is replaced at about this age; the venue ends it at 24 h."""
