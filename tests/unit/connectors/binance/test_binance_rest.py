"""REST client of Binance, against a small server in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from kronos_connectors.binance.options import BinanceOptions
from kronos_connectors.binance.rest import FUTURES, SPOT, ApiError, Host, RestClient
from kronos_stream.interfaces.source import SourceError, VenueRefused
from kronos_stream.market.clock import LoopClock
from kronos_stream.market.series import Series
from kronos_stream.testing.virtual_time import run_virtual

START = 1_750_000_020_000


MINUTE = 60_000


BTC = Series.parse("binance:BTC/USDT:1m")


Reply = Callable[[web.Request], Awaitable[web.StreamResponse]]


def row(opened: int, **changes: Any) -> list[Any]:
    numbers = {"o": "1.5", "h": "2", "l": "1", "c": "1.6", "v": "7", "q": "11"} | changes
    o, h, l, c, v, q = numbers.values()  # noqa: E741
    return [opened, o, h, l, c, v, opened + MINUTE - 1, q, 3, "1", "2", "0"]


async def serving(
    reply: Reply, host: Host = SPOT, **options: float
) -> tuple[RestClient, web.AppRunner]:
    app = web.Application()
    app.router.add_get("/{path:.*}", reply)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    settings = {"weight_share": 0.75, "timeout_seconds": 5.0} | options
    return RestClient(host, url, LoopClock(START), **settings), runner


def play(scene: Callable[[RestClient], Awaitable[None]], reply: Reply, host: Host = SPOT) -> None:
    async def main() -> None:
        rest, runner = await serving(reply, host)
        try:
            await scene(rest)
        finally:
            await rest.close()
            await runner.cleanup()

    run_virtual(main())


def replying_with(content: Any, **headers: str) -> Reply:
    async def reply(request: web.Request) -> web.Response:
        if request.path.endswith("/time"):
            return web.json_response({"serverTime": START})
        return web.json_response(content, headers=headers)

    return reply


def test_klines_leave_out_the_open_bar() -> None:
    rows = [row(START - 2 * MINUTE), row(START - MINUTE), row(START)]

    async def scene(rest: RestClient) -> None:
        candles = await rest.klines(BTC, "BTCUSDT", START - 2 * MINUTE, START + MINUTE)
        # A minute that ends now by our clock may still be open there.
        assert [candle.time for candle in candles] == [START - 2 * MINUTE]
        assert candles[0][1:] == (1.5, 2.0, 1.0, 1.6, 7.0, 11.0)

    async def reply(request: web.Request) -> web.Response:
        if request.path.endswith("/time"):
            return web.json_response({"serverTime": START})
        end = int(request.query["endTime"])
        return web.json_response([one for one in rows if one[0] <= end])

    play(scene, reply)


def test_klines_return_invalid_candles_for_the_sequencer_to_reject() -> None:
    async def scene(rest: RestClient) -> None:
        (candle,) = await rest.klines(BTC, "BTCUSDT", START - 5 * MINUTE, START - 4 * MINUTE)
        assert candle.invalid_reason() is not None

    play(scene, replying_with([row(START - 5 * MINUTE, l="0.0")]))


@pytest.mark.parametrize(
    "content",
    [
        {"result": "ok"},
        None,
        [["a", "b"], [1, 2, 3], None, {}],
        [row(START - 5 * MINUTE)[:7]],
        [row(START - 5 * MINUTE, c=1.5)],
        [row(START - 5 * MINUTE, c="NaN")],
        [row(START - 5 * MINUTE, v="-1")],
        [row(START - 9 * MINUTE)],
        [row(START - 5 * MINUTE), row(START - 5 * MINUTE)],
        [row(START - 4 * MINUTE), row(START - 5 * MINUTE)],
    ],
)
def test_malformed_klines_raise(content: Any) -> None:
    async def scene(rest: RestClient) -> None:
        with pytest.raises(SourceError, match="klines of BTC/USDT"):
            await rest.klines(BTC, "BTCUSDT", START - 5 * MINUTE, START - 2 * MINUTE)

    play(scene, replying_with(content))


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (403, "<html>", VenueRefused, "HTTP 403"),
        (451, "", VenueRefused, "HTTP 451"),
        (502, "<html>Bad Gateway</html>", SourceError, "HTTP 502"),
        (400, '{"code":-1121,"msg":"Invalid symbol."}', ApiError, "Invalid symbol"),
        (200, "<html>Please stand by</html>", SourceError, "not JSON"),
    ],
)
def test_error_responses_are_classified(
    status: int, body: str, kind: type[SourceError], message: str
) -> None:
    async def reply(_: web.Request) -> web.Response:
        return web.Response(status=status, text=body)

    async def scene(rest: RestClient) -> None:
        with pytest.raises(SourceError, match=message) as raised:
            await rest.symbols()
        assert type(raised.value) is kind

    play(scene, reply)


@pytest.mark.parametrize("status", [418, 429])
def test_rate_limit_pauses_all_requests(status: int) -> None:
    arrivals: list[float] = []
    notes: list[str] = []

    async def reply(_: web.Request) -> web.Response:
        arrivals.append(asyncio.get_running_loop().time())
        if len(arrivals) == 1:
            return web.Response(status=status, headers={"Retry-After": "90"})
        return web.json_response({"symbols": []})

    async def scene(rest: RestClient) -> None:
        rest.on_event = notes.append
        for _ in range(3):
            with pytest.raises(SourceError) as raised:
                await rest.symbols()
            assert 85 < raised.value.retry_after <= 90
            await asyncio.sleep(1)
        await asyncio.sleep(90)
        assert await rest.symbols() == []
        assert len(arrivals) == 2
        assert notes == ["rate limited"]

    play(scene, reply)


def test_weight_counted_by_the_venue_pauses_requests() -> None:
    async def scene(rest: RestClient) -> None:
        await rest.symbols()
        with pytest.raises(SourceError, match="wait"):
            await rest.symbols()

    play(scene, replying_with({"symbols": []}, **{"X-MBX-USED-WEIGHT-1M": "5900"}))


def test_hanging_requests_do_not_block_others() -> None:
    async def reply(request: web.Request) -> web.Response:
        if request.path.endswith("/time"):
            return web.json_response({"serverTime": START + 10 * MINUTE})
        if request.query["symbol"] == "HANGS":
            await asyncio.sleep(1_000)
        return web.json_response([row(int(request.query["startTime"]))])

    async def scene(rest: RestClient) -> None:
        loop = asyncio.get_running_loop()

        async def request(symbol: str) -> float:
            try:
                await rest.klines(BTC, symbol, START, START + MINUTE)
            except SourceError:
                assert symbol == "HANGS"
            return loop.time()

        ends = await asyncio.gather(
            *(request("HANGS" if n % 4 == 0 else "FINE") for n in range(24))
        )
        assert max(ends[0::4]) >= 5
        assert max(end for n, end in enumerate(ends) if n % 4) < 1 + 5

    play(scene, reply)


def test_futures_history_is_paged_at_the_lowest_weight() -> None:
    limits: list[int] = []

    async def reply(request: web.Request) -> web.Response:
        if request.path.endswith("/time"):
            return web.json_response({"serverTime": START + 10_000 * MINUTE})
        first, last, limit = (int(request.query[k]) for k in ("startTime", "endTime", "limit"))
        limits.append(limit)
        opens = range(-(-first // MINUTE) * MINUTE, last + 1, MINUTE)
        return web.json_response([row(opened) for opened in opens][:limit])

    async def scene(rest: RestClient) -> None:
        candles = await rest.klines(BTC, "BTCUSDT", START, START + 1_050 * MINUTE)
        assert [c.time for c in candles] == list(range(START, START + 1_050 * MINUTE, MINUTE))
        assert limits == [499, 499, 52]

    play(scene, reply, FUTURES)


def test_unknown_interval_is_requested() -> None:
    async def reply(request: web.Request) -> web.Response:
        if request.query["interval"] == "10s":
            return web.json_response([])
        return web.json_response({"code": -1120, "msg": "Invalid interval."}, status=400)

    async def scene(rest: RestClient) -> None:
        assert await rest.has_interval("BTCUSDT", "10s")
        assert not await rest.has_interval("BTCUSDT", "7m")

    play(scene, reply)


@pytest.mark.parametrize("url", ["http://h:99999", "http://[::1", "http://", "http://h/?key=1"])
def test_invalid_urls_are_rejected(url: str) -> None:
    with pytest.raises(ValueError, match="rest_url"):
        BinanceOptions(rest_url=url)
