"""The real ccxt, and what an exchange may answer; over real sockets, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random

import orjson
import pytest
from aiohttp import web

from kronos_connectors.ccxt import CONNECTOR, CcxtOptions
from kronos_stream.interfaces.source import Source, SourceCallbacks, SourceError, VenueRefused
from kronos_stream.market.clock import LoopClock
from kronos_stream.market.series import Series

START = 1_750_000_000_000
SERIES = Series.parse("ccxt.binance:A/B:1m")
NOBODY = SourceCallbacks(lambda _: None, lambda *_: None, lambda _: None)


@asynccontextmanager
async def connected_source(
    handle: Callable[[web.Request], Awaitable[web.StreamResponse]], path: str = ""
) -> AsyncIterator[Source]:
    """Source of an exchange that sends this response to every request."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host = f"127.0.0.1:{runner.addresses[0][1]}"
    urls = {"public": f"http://{host}{path}", "ws": {"spot": f"ws://{host}/stream"}}
    config = {"urls": {"api": urls}, "options": {"fetchMarkets": {"types": ["spot"]}}}
    raised = CcxtOptions.model_validate({"config": orjson.dumps({"binance": config}).decode()})
    source = CONNECTOR.build("ccxt.binance", raised, LoopClock(START), Random(1))
    source.subscribe([SERIES])
    try:
        yield source
    finally:
        await source.close()
        await runner.cleanup()


@pytest.mark.virtual_time
@pytest.mark.parametrize("status", [451, 403])
async def test_restricted_location_ends_the_source(status: int) -> None:
    async def refuse(_: web.Request) -> web.Response:
        return web.Response(status=status, text="service unavailable from a restricted location")

    async with connected_source(refuse) as source:
        with pytest.raises(VenueRefused, match=str(status)):
            await source.unsupported([SERIES])
        with pytest.raises(VenueRefused):
            await source.run(NOBODY)


@pytest.mark.virtual_time
async def test_single_empty_list_of_markets_is_not_trusted() -> None:
    answers = 0

    async def falter(_: web.Request) -> web.Response:
        nonlocal answers
        answers += 1
        some = {"symbol": "CD", "baseAsset": "C", "quoteAsset": "D", "status": "TRADING"}
        symbol = {"symbol": "AB", "baseAsset": "A", "quoteAsset": "B", "status": "BREAK"}
        return web.json_response({"symbols": [some] if answers == 1 else [some, symbol]})

    async with connected_source(falter) as source:
        assert await source.unsupported([SERIES]) == {}
        assert answers == 2


@pytest.mark.virtual_time
@pytest.mark.parametrize("wait", [None, "30"])
async def test_rate_limited_handshake_delays_clients(wait: str | None) -> None:
    arrivals: list[float] = []

    async def busy(request: web.Request) -> web.Response:
        if request.path.endswith("exchangeInfo"):
            symbol = {"symbol": "AB", "baseAsset": "A", "quoteAsset": "B", "status": "TRADING"}
            return web.json_response({"symbols": [symbol]})
        arrivals.append(asyncio.get_running_loop().time())
        headers = {} if wait is None else {"Retry-After": wait}
        return web.Response(status=429, headers=headers)

    async with connected_source(busy) as source:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(300):
                await source.run(NOBODY)
    assert 3 <= len(arrivals) <= 300 / float(wait or 60) + 1


@pytest.mark.virtual_time
async def test_errors_mask_secrets_in_urls() -> None:
    async def fail(_: web.Request) -> web.Response:
        return web.Response(status=500, text="broken")

    async with connected_source(fail, path="/s3cr3t-path") as source:
        with pytest.raises(SourceError) as raised:
            await source.unsupported([SERIES])
        assert "/***/" in str(raised.value)
        assert "s3cr3t" not in str(raised.value)
