"""Plain HTTP and WebSocket clients of the simulated exchange, without code of a connector."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from kronos_stream.market.candle import Candle
from kronos_stream.market.clock import LoopClock
from kronos_stream.testing.exchange import SimulatedExchange

START = 1_750_000_000_000


@dataclass
class ExchangeClient:
    """An exchange with an HTTP client."""

    exchange: SimulatedExchange
    http: aiohttp.ClientSession

    async def get(self, path: str, **query: Any) -> tuple[int, Any, Any]:
        """Status, content and headers of a response."""
        async with self.http.get(path, params=query) as response:
            return response.status, await response.json(), response.headers


@asynccontextmanager
async def exchange_client(start: int = START, **options: Any) -> AsyncIterator[ExchangeClient]:
    """Run an exchange whose clock starts at ``start``, and connect a client to it."""
    exchange = SimulatedExchange(clock=LoopClock(start), **{"history": 20, **options})
    timeout = aiohttp.ClientTimeout(total=300)
    async with exchange, aiohttp.ClientSession(exchange.rest_url, timeout=timeout) as http:
        yield ExchangeClient(exchange, http)


def row_candle(row: list[Any]) -> Candle:
    """Candle of a row of REST."""
    return Candle(row[0], *map(float, (*row[1:6], row[7])))


def event_candle(message: str | bytes) -> tuple[Candle, bool]:
    """Candle of a kline event, combined or not, and whether it is closed."""
    event = orjson.loads(message)
    kline = event.get("data", event)["k"]
    return Candle(kline["t"], *(float(kline[name]) for name in "ohlcvq")), kline["x"]


def handshake(names: list[str]) -> bytes:
    """WebSocket handshake that subscribes to streams, for a client without a library."""
    return (
        f"GET /stream?streams={'/'.join(names)} HTTP/1.1\r\nHost: here\r\n"
        "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    ).encode()
