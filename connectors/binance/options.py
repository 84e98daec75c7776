"""How to reach Binance: ``KRONOS_STREAM_BINANCE__*``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class BinanceOptions(BaseModel):
    """Public market data alone; no key is needed. Limits are the venue's, with a margin."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ws_url: str = Field("wss://data-stream.binance.vision", pattern=r"^wss?://\S+$")
    rest_url: str = Field("https://data-api.binance.vision", pattern=r"^https?://\S+$")
    futures_ws_url: str = Field("wss://fstream.binance.com/market", pattern=r"^wss?://\S+$")
    futures_rest_url: str = Field("https://fapi.binance.com", pattern=r"^https?://\S+$")
    weight_per_minute: int = Field(
        1_800,
        ge=20,
        description="request weight to use, per host; the venue allows 6,000 and 2,400",
    )
    streams_per_connection: int = Field(
        400, ge=1, le=1_024, description="klines per websocket; the venue allows 1,024"
    )
    timeout_seconds: float = Field(10.0, gt=0, description="for a connection or an answer")
    stall_seconds: float = Field(
        30.0, gt=0, description="a socket that says nothing for so long is replaced"
    )
    lifetime_seconds: float = Field(
        82_800.0, gt=0, description="a socket is replaced at this age; the venue ends it at 24 h"
    )
