"""Settings of Binance: ``KRONOS_STREAM_BINANCE__*``."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _url(text: str) -> str:
    parts = urlsplit(text)  # this and the next line raise ValueError with a reason
    _ = parts.port
    if not parts.hostname or parts.query or parts.fragment:
        raise ValueError("expected an address such as wss://host:port/path, without a query")
    return text


_WsUrl = Annotated[str, Field(pattern=r"^wss?://\S+$"), AfterValidator(_url)]
_RestUrl = Annotated[str, Field(pattern=r"^https?://\S+$"), AfterValidator(_url)]


class BinanceOptions(BaseModel):
    """Settings of the source; market data is public and needs no key."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    ws_url: _WsUrl = "wss://data-stream.binance.vision"
    """Websocket address of the spot market."""
    rest_url: _RestUrl = "https://data-api.binance.vision"
    """REST address of the spot market."""
    futures_ws_url: _WsUrl = "wss://fstream.binance.com/market"
    """Websocket address of USD-M futures."""
    futures_rest_url: _RestUrl = "https://fapi.binance.com"
    """REST address of USD-M futures."""
    weight_share: float = Field(default=0.75, gt=0, le=1)
    """Share of the request weight per minute that the venue allows an address."""
    streams_per_connection: int = Field(default=400, ge=1, le=1_024)
    """Klines per websocket; the venue allows 1,024."""
    timeout_seconds: float = Field(default=10.0, gt=0, le=120)
    """Time limit for opening a connection and for the first byte of a response."""
    stall_seconds: float = Field(default=10.0, gt=0, le=300)
    """A socket that is silent for this long is sent a request, to see whether it works."""
    lifetime_seconds: float = Field(default=82_800.0, ge=10, le=86_000)
    """A socket is replaced at about this age; the venue ends it at 24 h."""
