"""Binance's REST side: its weight, its clock, its symbols; answers played by a small server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from kronos_connectors._shared.http_status import parse_retry_after
from kronos_connectors._shared.venue_clock import VenueClock
from kronos_connectors.binance.options import BinanceOptions
from kronos_connectors.binance.rate_limit import WeightLimiter
from kronos_connectors.binance.rest import FUTURES, SPOT, ApiError, Host, RestClient
from kronos_connectors.binance.symbols import Listing
from kronos_stream.interfaces.source import SourceError, VenueRefused
from kronos_stream.market.clock import LoopClock, ManualClock
from kronos_stream.market.series import Series
from kronos_stream.testing.virtual_time import run_virtual

START = 1_750_000_020_000
MINUTE = 60_000
BTC = Series.parse("binance:BTC/USDT:1m")

# -- weight --------------------------------------------------------------------------------


def test_weight_flows_evenly_and_in_order() -> None:
    async def main() -> None:
        budget, loop = WeightLimiter(600, 0.5, LoopClock(START)), asyncio.get_running_loop()
        spent: list[tuple[int, float]] = []

        async def spend(number: int) -> None:
            await budget.acquire(5)
            spent.append((number, loop.time()))

        await asyncio.gather(*(spend(number) for number in range(65)))
        assert [number for number, _ in spent] == list(range(65))
        times = [time for _, time in spent]
        assert times[4] == 0  # five seconds' worth at once
        assert 59 < times[-1] < 62  # 5 a second
        assert all(later - first > 55 for first, later in zip(times, times[60:], strict=False))

    run_virtual(main())


def test_who_waits_for_weight_is_told_when_the_venue_wants_quiet() -> None:
    async def main() -> None:
        budget = WeightLimiter(600, 0.5, LoopClock(START))
        await budget.acquire(25)
        waiting = [asyncio.create_task(budget.acquire(5)) for _ in range(3)]
        await asyncio.sleep(0)
        budget.pause(120)
        for task in waiting:
            with pytest.raises(SourceError) as told:
                await task
            assert 118 < told.value.retry_after <= 120
        await asyncio.sleep(121)
        await budget.acquire(5)

    run_virtual(main())


def test_one_who_gives_up_does_not_hold_up_the_others() -> None:
    async def main() -> None:
        budget = WeightLimiter(600, 0.5, LoopClock(START))
        await budget.acquire(25)
        first, second = (asyncio.create_task(budget.acquire(25)) for _ in range(2))
        await asyncio.sleep(1)
        first.cancel()
        async with asyncio.timeout(6):
            await second

    run_virtual(main())


def test_weight_that_others_use_is_counted_until_the_minute_ends() -> None:
    async def main() -> None:
        budget = WeightLimiter(6_000, 0.5, LoopClock(START))
        venue_time = START // MINUTE * MINUTE + 45_000
        budget.record_usage(4_499, venue_time)
        await budget.acquire(1)
        budget.record_usage(4_500, venue_time)
        with pytest.raises(SourceError) as told:
            await budget.acquire(1)
        assert told.value.retry_after == pytest.approx(15)

    run_virtual(main())


def test_a_clock_set_back_neither_gives_weight_nor_takes_it() -> None:
    async def main() -> None:
        clock = ManualClock(START)
        budget = WeightLimiter(600, 0.5, clock)
        clock._now -= 3_600_000
        async with asyncio.timeout(1):
            await budget.acquire(25)
        waiting = asyncio.create_task(budget.acquire(5))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        clock.advance(clock.now() + 1_002)
        await waiting

    run_virtual(main())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("7", 7), ("0", 1), (None, 60), ("soon", 60), ("-5", 60), ("nan", 60), ("99999999", 259_200)],
)
def test_the_wait_asked_for_is_read_and_bounded(text: str | None, seconds: float) -> None:
    assert parse_retry_after(text) == seconds


# -- the venue's clock -----------------------------------------------------------------------


def test_the_venues_time_is_never_taken_to_be_later_than_it_is() -> None:
    clock = VenueClock()
    assert clock.needs_update(START, 0.0)
    clock.update(START, START + 5_000, START + 400, 10.0)  # said somewhere in these 400 ms
    assert clock.offset == 4_800
    for said_at in (START, START + 400):
        venue_is_ahead = START + 5_000 - said_at
        for later in (400, 30_000, 59_000):
            for drift in (-0.0004, 0.0004):
                there = START + later + venue_is_ahead + drift * later
                assert there - 470 <= clock.lower_bound(START + later) <= there


@pytest.mark.parametrize(
    ("now", "uptime", "stale"),
    [
        (30_000, 40.0, False),
        (61_000, 71.0, True),
        (30_000, 11.0, True),  # set forward
        (1_000, 40.0, True),  # set back a little
        (-5_000, 15.0, True),
    ],
)
def test_it_is_measured_again_when_old_or_when_our_clock_was_set(
    now: int,
    uptime: float,
    stale: bool,  # noqa: FBT001
) -> None:
    clock = VenueClock()
    clock.update(START, START, START, 10.0)
    assert clock.needs_update(START + now, uptime) is stale


# -- symbols -------------------------------------------------------------------------------


def _info(base: str, quote: str, status: str = "TRADING", **more: str) -> dict[str, str]:
    return {"symbol": base + quote, "baseAsset": base, "quoteAsset": quote, "status": status} | more


SPOT_INFO = [
    _info("BTC", "USDT"),
    _info("1000SATS", "USDT"),
    _info("USDT", "TRY"),
    _info("LUNA", "USDT", "BREAK"),
    {"symbol": "NOBASE"},
]
FUTURES_INFO = [
    _info("BTC", "USDT", contractType="PERPETUAL", marginAsset="USDT"),
    _info("BTC", "USDT", contractType="CURRENT_QUARTER", marginAsset="USDT")
    | {"symbol": "BTCUSDT_260327"},
    _info("ETH", "BTC", contractType="PERPETUAL", marginAsset="BTC"),
    _info("OLD", "USDT", "SETTLING", contractType="PERPETUAL", marginAsset="USDT"),
]


def test_symbols_are_mapped_by_what_the_venue_says_of_them() -> None:
    spot, futures = Listing(SPOT_INFO, futures=False), Listing(FUTURES_INFO, futures=True)
    assert spot.venue_symbol("USDT/TRY") == "USDTTRY"
    assert spot.venue_symbol("1000SATS/USDT") == "1000SATSUSDT"
    assert spot.venue_symbol("BTC/USDT:USDT") is None
    assert futures.venue_symbol("BTC/USDT:USDT") == "BTCUSDT"
    assert futures.venue_symbol("ETH/BTC:BTC") == "ETHBTC"
    assert futures.venue_symbol("BTC/USDT") is None
    for symbol in ("BTC/USDT", "USDT/TRY"):
        assert spot.unsupported_reason(symbol) is None


@pytest.mark.parametrize(
    ("symbol", "reason"),
    [
        ("BTC/USDC", "does not list it; did you mean BTC/USDT?"),
        ("BTCUSDT", "did you mean BTC/USDT?"),
        ("btc/usdt", "did you mean BTC/USDT?"),
        ("QQQ/ZZZ", "does not list it"),
    ],
)
def test_what_is_not_there_is_explained(symbol: str, reason: str) -> None:
    assert reason in str(Listing(SPOT_INFO, futures=False).unsupported_reason(symbol))


def test_what_does_not_trade_now_is_said_but_no_reason_to_fail() -> None:
    spot, futures = Listing(SPOT_INFO, futures=False), Listing(FUTURES_INFO, futures=True)
    assert spot.halted_status("LUNA/USDT") == "BREAK"
    assert futures.halted_status("OLD/USDT:USDT") == "SETTLING"
    assert (
        spot.unsupported_reason("LUNA/USDT") is futures.unsupported_reason("OLD/USDT:USDT") is None
    )
    assert spot.halted_status("BTC/USDT") is None


# -- requests ------------------------------------------------------------------------------

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
    knobs = {"weight_share": 0.75, "timeout_seconds": 5.0} | options
    return RestClient(host, url, LoopClock(START), **knobs), runner


def play(scene: Callable[[RestClient], Awaitable[None]], reply: Reply, host: Host = SPOT) -> None:
    async def main() -> None:
        rest, runner = await serving(reply, host)
        try:
            await scene(rest)
        finally:
            await rest.close()
            await runner.cleanup()

    run_virtual(main())


def answering(content: Any, **headers: str) -> Reply:
    async def reply(request: web.Request) -> web.Response:
        if request.path.endswith("/time"):
            return web.json_response({"serverTime": START})
        return web.json_response(content, headers=headers)

    return reply


def test_rows_become_candles_and_the_open_one_is_left_out() -> None:
    rows = [row(START - 2 * MINUTE), row(START - MINUTE), row(START)]

    async def scene(rest: RestClient) -> None:
        candles = await rest.klines(BTC, "BTCUSDT", START - 2 * MINUTE, START + MINUTE)
        # A minute that ends just now may not have ended there.
        assert [candle.time for candle in candles] == [START - 2 * MINUTE]
        assert candles[0][1:] == (1.5, 2.0, 1.0, 1.6, 7.0, 11.0)

    async def reply(request: web.Request) -> web.Response:
        if request.path.endswith("/time"):
            return web.json_response({"serverTime": START})
        end = int(request.query["endTime"])
        return web.json_response([one for one in rows if one[0] <= end])

    play(scene, reply)


def test_a_candle_that_cannot_be_is_handed_on_for_the_tape_to_judge() -> None:
    async def scene(rest: RestClient) -> None:
        (candle,) = await rest.klines(BTC, "BTCUSDT", START - 5 * MINUTE, START - 4 * MINUTE)
        assert candle.invalid_reason() is not None

    play(scene, answering([row(START - 5 * MINUTE, l="0.0")]))


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
def test_an_answer_that_is_none_is_an_error(content: Any) -> None:
    async def scene(rest: RestClient) -> None:
        with pytest.raises(SourceError, match="klines of BTC/USDT"):
            await rest.klines(BTC, "BTCUSDT", START - 5 * MINUTE, START - 2 * MINUTE)

    play(scene, answering(content))


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (403, "<html>", VenueRefused, "HTTP 403"),
        (451, "", VenueRefused, "HTTP 451"),
        (502, "<html>Bad Gateway</html>", SourceError, "HTTP 502"),
        (400, '{"code":-1121,"msg":"Invalid symbol."}', ApiError, "Invalid symbol"),
        (200, "<html>Please stand by</html>", SourceError, "not JSON"),
    ],
)
def test_refusals_are_told_apart(
    status: int, body: str, kind: type[SourceError], words: str
) -> None:
    async def reply(_: web.Request) -> web.Response:
        return web.Response(status=status, text=body)

    async def scene(rest: RestClient) -> None:
        with pytest.raises(SourceError, match=words) as failed:
            await rest.symbols()
        assert type(failed.value) is kind

    play(scene, reply)


@pytest.mark.parametrize("status", [418, 429])
def test_when_told_to_wait_all_wait(status: int) -> None:
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
            with pytest.raises(SourceError) as failed:
                await rest.symbols()
            assert 85 < failed.value.retry_after <= 90
            await asyncio.sleep(1)
        await asyncio.sleep(90)
        assert await rest.symbols() == []
        assert len(arrivals) == 2
        assert notes == ["rate limited"]

    play(scene, reply)


def test_the_venues_own_count_of_weight_is_heeded() -> None:
    async def scene(rest: RestClient) -> None:
        await rest.symbols()
        with pytest.raises(SourceError, match="wait"):
            await rest.symbols()

    play(scene, answering({"symbols": []}, **{"X-MBX-USED-WEIGHT-1M": "5900"}))


def test_one_symbol_that_hangs_does_not_hold_up_the_others() -> None:
    async def reply(request: web.Request) -> web.Response:
        if request.path.endswith("/time"):
            return web.json_response({"serverTime": START + 10 * MINUTE})
        if request.query["symbol"] == "HANGS":
            await asyncio.sleep(1_000)
        return web.json_response([row(int(request.query["startTime"]))])

    async def scene(rest: RestClient) -> None:
        loop = asyncio.get_running_loop()

        async def ask(symbol: str) -> float:
            try:
                await rest.klines(BTC, symbol, START, START + MINUTE)
            except SourceError:
                assert symbol == "HANGS"
            return loop.time()

        ends = await asyncio.gather(*(ask("HANGS" if n % 4 == 0 else "FINE") for n in range(24)))
        assert max(ends[0::4]) >= 5
        assert max(end for n, end in enumerate(ends) if n % 4) < 1 + 5

    play(scene, reply)


def test_pages_of_futures_are_those_that_cost_least_and_none_is_lost() -> None:
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


def test_an_interval_that_nobody_knows_is_asked_for() -> None:
    async def reply(request: web.Request) -> web.Response:
        if request.query["interval"] == "10s":
            return web.json_response([])
        return web.json_response({"code": -1120, "msg": "Invalid interval."}, status=400)

    async def scene(rest: RestClient) -> None:
        assert await rest.has_interval("BTCUSDT", "10s")
        assert not await rest.has_interval("BTCUSDT", "7m")

    play(scene, reply)


@pytest.mark.parametrize("url", ["http://h:99999", "http://[::1", "http://", "http://h/?key=1"])
def test_addresses_that_cannot_be_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="rest_url"):
        BinanceOptions(rest_url=url)
