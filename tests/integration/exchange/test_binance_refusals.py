"""Source of Binance where the venue refuses requests or connections."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from random import Random

import pytest
from aiohttp import web

from kronos_connectors.binance import CONNECTOR, BinanceOptions
from kronos_stream.interfaces.source import (
    VenueRefused,
)
from kronos_stream.market.clock import LoopClock
from kronos_stream.market.series import Series
from tests.support.recorded_updates import RecordedUpdates, served

START = 1_750_000_000_000


@pytest.mark.virtual_time
@pytest.mark.parametrize("status", [403, 451])
async def test_blocked_source_ends_without_retry(status: int) -> None:
    requests = 0

    async def refuse(_: web.Request) -> web.Response:
        nonlocal requests
        requests += 1
        return web.Response(status=status, text="not in your country")

    async with served(refuse) as url:
        source = CONNECTOR.build(
            "binance",
            BinanceOptions(rest_url=url, ws_url=url.replace("http", "ws")),
            LoopClock(START),
            Random(1),
        )
        series = Series.parse("binance:BTC/USDT:1m")
        with pytest.raises(VenueRefused, match=str(status)):
            await source.unsupported([series])
        source.subscribe([series])
        with pytest.raises(VenueRefused):
            await source.run(RecordedUpdates().callbacks())
        await source.close()
    assert requests == 2


@pytest.mark.virtual_time
async def test_rate_limited_handshake_delays_connections() -> None:
    arrivals: list[float] = []

    async def busy(request: web.Request) -> web.Response:
        if request.path.endswith("exchangeInfo"):
            info = {"symbol": "AB", "baseAsset": "A", "quoteAsset": "B", "status": "TRADING"}
            return web.json_response({"symbols": [info]})
        arrivals.append(asyncio.get_running_loop().time())
        return web.Response(status=429, headers={"Retry-After": "120"})

    async with served(busy) as url:
        options = BinanceOptions(rest_url=url, ws_url=url.replace("http", "ws"))
        source = CONNECTOR.build("binance", options, LoopClock(START), Random(1))
        source.subscribe([Series.parse("binance:A/B:1m")])
        recorded = RecordedUpdates()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(300):
                await source.run(recorded.callbacks())
        await source.close()
    assert [round(b - a) >= 120 for a, b in pairwise(arrivals)] == [True, True]
    assert recorded.events["rate limited"] == 3
