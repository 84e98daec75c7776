"""The real ccxt's Kraken client, to whom Kraken's own protocol is spoken; in virtual time.

Another exchange than the simulated one: it leaves out bars without trades, serves a limited
history, tells its time in whole seconds, and names no timeframe where ccxt tells pushes apart.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from random import Random

import orjson
import pytest
from aiohttp import web

from kronos_connectors.ccxt import CONNECTOR, CcxtOptions
from kronos_stream.interfaces.source import Source, SourceCallbacks
from kronos_stream.market.candle import Update
from kronos_stream.market.clock import LoopClock
from kronos_stream.market.series import Series

START = 1_750_000_000_000
MINUTE = 60_000
PAIR = {
    "altname": "XBTUSD", "wsname": "XBT/USD", "base": "XXBT", "quote": "ZUSD", "status": "online",
    "lot_decimals": 8, "pair_decimals": 1, "fees": [[0, 0.4]], "fees_maker": [[0, 0.2]],
    "leverage_buy": [], "ordermin": "0.0001", "costmin": "0.5",
}  # fmt: skip
ASSETS = {
    name: {"aclass": "currency", "altname": name[1:], "decimals": 8} for name in ("XXBT", "ZUSD")
}


def trades(opened: int) -> bool:
    """Return whether anything was traded; in every seventh minute nothing was."""
    return opened // MINUTE % 7 != 0


class FakeKraken:
    """Minimal implementation of Kraken's protocol."""

    def __init__(self, clock: LoopClock) -> None:
        self._clock = clock
        self.subscribed: list[int] = []

    async def rest(self, request: web.Request) -> web.Response:
        answers: dict[str, object] = {"AssetPairs": {"XXBTZUSD": PAIR}, "Assets": ASSETS}
        answers["Time"] = {"unixtime": self._clock.now() // 1000}
        answers["OHLC"] = {"XXBTZUSD": self._rows(request), "last": 0}
        return web.json_response({"error": [], "result": answers[request.path.rpartition("/")[2]]})

    def _rows(self, request: web.Request) -> list[list[object]]:
        step = int(request.query.get("interval", 1)) * MINUTE
        since, now = int(request.query.get("since", 0)) * 1000, self._clock.now()
        opens = range(now // step * step - 719 * step, now + 1, step)
        kept = [opened for opened in opens if opened > since and (trades(opened) or step > MINUTE)]
        return [[opened // 1000, "2", "4", "1", "3", "2.5", "7", 9] for opened in kept]

    async def socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        pushing = []
        async for message in socket:
            asked = orjson.loads(message.data)
            if asked["method"] == "subscribe":
                interval = asked["params"]["interval"]
                self.subscribed.append(interval)
                pushing.append(asyncio.create_task(self._push(socket, interval)))
        for task in pushing:
            task.cancel()
        return socket

    async def _push(self, socket: web.WebSocketResponse, interval: int) -> None:
        with suppress(ConnectionError):
            while True:
                opened = self._clock.now() // (interval * MINUTE) * interval * MINUTE
                begin = datetime.fromtimestamp(opened / 1000, UTC).strftime(
                    "%Y-%m-%dT%H:%M:%S.000Z"
                )
                candle = {"open": 2.0, "high": 4.0, "low": 1.0, "close": 3.0, "volume": 7.0}
                bar = {"symbol": "BTC/USD", "interval": interval, "interval_begin": begin}
                message = {"channel": "ohlc", "type": "update", "data": [bar | candle]}
                await socket.send_json(message)
                await asyncio.sleep(1)


@asynccontextmanager
async def kraken() -> AsyncIterator[tuple[FakeKraken, Source]]:
    clock = LoopClock(START)
    venue = FakeKraken(clock)
    app = web.Application()
    app.add_routes([web.get("/v2", venue.socket), web.route("*", "/{path:.*}", venue.rest)])
    runner = web.AppRunner(app, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host = f"127.0.0.1:{runner.addresses[0][1]}"
    urls = {"public": f"http://{host}", "ws": {"publicV2": f"ws://{host}/v2"}}
    config = orjson.dumps({"kraken": {"urls": {"api": urls}, "rateLimit": 1}}).decode()
    source = CONNECTOR.build(
        "kraken", CcxtOptions.model_validate({"config": config}), clock, Random(1)
    )
    try:
        yield venue, source
    finally:
        await source.close()
        await runner.cleanup()


@pytest.mark.virtual_time
async def test_kraken_is_watched_in_two_timeframes_with_its_history() -> None:
    minutes, fives = (Series.parse(f"kraken:BTC/USD:{length}") for length in ("1m", "5m"))

    updates: list[Update] = []
    async with kraken() as (venue, source):
        assert source.traits.fills_empty is False
        assert await source.unsupported([minutes, fives]) == {}
        source.subscribe([minutes, fives])
        intake = SourceCallbacks(updates.append, lambda *_: None, lambda _: None)
        running = asyncio.create_task(source.run(intake))
        await asyncio.sleep(400)
        assert sorted(venue.subscribed) == [1, 5]
        for series, step in ((minutes, MINUTE), (fives, 5 * MINUTE)):
            received = [one for one in updates if one.series == series]
            assert len(received) > 350
            assert {one.candle.time for one in received} == {
                one.received // step * step for one in received
            }
        now = START + 400_000
        bars = await source.history(minutes, now - 1_000 * MINUTE, now)
        opens = list(range(now // MINUTE * MINUTE - 719 * MINUTE, now, MINUTE))
        assert [bar.time for bar in bars] == [one for one in opens[:-1] if trades(one)]
        quiet = next(one for one in opens if not trades(one))
        assert await source.history(minutes, quiet, quiet + MINUTE) == []
        running.cancel()
        await asyncio.wait([running])
