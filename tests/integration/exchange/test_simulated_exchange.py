"""The simulated exchange speaks Binance's protocol; heard by plain clients that know nothing of it.

Field names and order, limits and messages are those of the venue's public documentation.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
import pytest
import websockets

from kronos_stream.market.candle import Candle
from kronos_stream.market.clock import LoopClock, SystemClock
from kronos_stream.market.series import Series
from kronos_stream.testing.exchange import Faults, SimulatedExchange
from kronos_stream.testing.virtual_time import run_virtual

START = 1_750_000_000_000


@dataclass
class ExchangeClient:
    """At an exchange, with a plain HTTP client."""

    exchange: SimulatedExchange
    http: aiohttp.ClientSession

    async def get(self, path: str, **query: Any) -> tuple[int, Any, Any]:
        """Status, content and headers."""
        async with self.http.get(path, params=query) as answer:
            return answer.status, await answer.json(), answer.headers


def run_with_client(
    scene: Callable[[ExchangeClient], Awaitable[None]], start: int = START, **options: Any
) -> None:
    """Play ``scene`` in virtual time."""

    async def main() -> None:
        exchange = SimulatedExchange(clock=LoopClock(start), **{"history": 20, **options})
        timeout = aiohttp.ClientTimeout(total=10)
        async with exchange, aiohttp.ClientSession(exchange.rest_url, timeout=timeout) as http:
            await scene(ExchangeClient(exchange, http))

    run_virtual(main())


def candle(row: list[Any]) -> Candle:
    """Of a REST row."""
    return Candle(row[0], *map(float, (*row[1:6], row[7])))


def pushed(message: str | bytes) -> tuple[Candle, bool]:
    """Of a kline event, in a wrapper or not."""
    event = orjson.loads(message)
    k = event.get("data", event)["k"]
    return Candle(k["t"], *(float(k[name]) for name in "ohlcvq")), k["x"]


def upgrade(names: list[str]) -> bytes:
    """A websocket's handshake by hand."""
    return (
        f"GET /stream?streams={'/'.join(names)} HTTP/1.1\r\nHost: here\r\n"
        "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    ).encode()


# -- REST ----------------------------------------------------------------------------------


def test_time_and_ping() -> None:
    async def scene(here: ExchangeClient) -> None:
        await asyncio.sleep(12.5)
        for prefix in ("/api/v3", "/fapi/v1"):
            assert (await here.get(f"{prefix}/time"))[1] == {"serverTime": START + 12_500}
            assert (await here.get(f"{prefix}/ping"))[1] == {}

    run_with_client(scene, symbols=1)


def test_exchange_info_lists_what_trades() -> None:
    async def scene(here: ExchangeClient) -> None:
        _, info, _ = await here.get("/api/v3/exchangeInfo")
        assert [s["symbol"] for s in info["symbols"]] == ["SIM00USDT", "SIM01USDT", "SIM02USDT"]
        for listed in info["symbols"]:
            assert (listed["status"], listed["quoteAsset"]) == ("TRADING", "USDT")
            assert listed["baseAsset"] + "USDT" == listed["symbol"]
        assert info["rateLimits"][0]["limit"] == 6000
        _, one, _ = await here.get("/api/v3/exchangeInfo", symbol="SIM01USDT")
        assert [s["symbol"] for s in one["symbols"]] == ["SIM01USDT"]
        _, two, _ = await here.get("/api/v3/exchangeInfo", symbols='["SIM02USDT","SIM00USDT"]')
        assert [s["symbol"] for s in two["symbols"]] == ["SIM02USDT", "SIM00USDT"]
        _, futures, _ = await here.get("/fapi/v1/exchangeInfo")
        assert [s["contractType"] for s in futures["symbols"]] == ["PERPETUAL"] * 2
        assert futures["rateLimits"][0]["limit"] == 2400

    run_with_client(scene, symbols=3, perpetuals=2)


def test_klines_are_rows_of_twelve_with_decimal_strings() -> None:
    async def scene(here: ExchangeClient) -> None:
        await asyncio.sleep(3.5)
        status, rows, _ = await here.get(
            "/api/v3/klines", symbol="SIM00USDT", interval="1s", startTime=START
        )
        assert status == 200
        assert [row[0] for row in rows] == [START, START + 1000, START + 2000, START + 3000]
        for row in rows:
            assert len(row) == 12
            assert row[6] == row[0] + 999
            assert isinstance(row[8], int)
            for number in (*row[1:6], row[7], row[9], row[10]):
                assert len(number.partition(".")[2]) == 8
            assert candle(row).invalid_reason() is None
        truth = here.exchange.truth(Series.parse("any:SIM00/USDT:1s"), START)
        # The last row is the unfinished one, which the truth does not have yet.
        assert [candle(row) for row in rows[:-1]] == [bar.candle for bar in truth]

    run_with_client(scene, symbols=2)


def test_klines_between_times_and_by_limit() -> None:
    async def scene(here: ExchangeClient) -> None:
        async def opens(path: str = "/api/v3/klines", **query: Any) -> list[int]:
            rows = (await here.get(path, symbol="SIM00USDT", interval="1m", **query))[1]
            return [(row[0] - minute) // 60_000 for row in rows]

        minute = START - START % 60_000
        assert len(await opens()) == 500
        assert (await opens())[-1] == 0
        assert await opens(limit=3) == [-2, -1, 0]
        assert await opens(startTime=minute - 90_000, limit=2) == [-1, 0]
        assert await opens(endTime=minute - 1, limit=2) == [-2, -1]
        assert await opens(startTime=minute - 300_000, endTime=minute - 120_000) == [-5, -4, -3, -2]
        assert await opens(startTime=minute + 60_000) == []
        # Spot cuts what is too much; futures give more, and refuse what is too much.
        assert len(await opens(limit=5000)) == 1000
        assert len(await opens("/fapi/v1/klines", limit=1500)) == 1500
        status, error, _ = await here.get(
            "/fapi/v1/klines", symbol="SIM00USDT", interval="1m", limit=1501
        )
        assert (status, error["code"]) == (400, -1130)

    run_with_client(scene, symbols=1, perpetuals=1, timeframes=("1m",), history=1600)


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ({"symbol": "NOSUCHUSDT", "interval": "1s"}, -1121),
        ({"symbol": "sim00usdt", "interval": "1s"}, -1121),
        ({"symbol": "SIM00USDT", "interval": "7m"}, -1120),
        ({"interval": "1s"}, -1102),
        ({"symbol": "SIM00USDT"}, -1102),
        ({"symbol": "SIM00USDT", "interval": "1s", "limit": "many"}, -1100),
        ({"symbol": "SIM00USDT", "interval": "1s", "limit": "0"}, -1130),
        ({"symbol": "SIM00USDT", "interval": "1s", "startTime": "2", "endTime": "1"}, -1023),
    ],
)
def test_bad_requests_get_the_venues_errors(query: dict[str, str], code: int) -> None:
    async def scene(here: ExchangeClient) -> None:
        status, error, _ = await here.get("/api/v3/klines", **query)
        assert (status, error["code"]) == (400, code)
        assert error["msg"]

    run_with_client(scene, symbols=1)


def test_tickers_of_a_day() -> None:
    async def scene(here: ExchangeClient) -> None:
        _, tickers, _ = await here.get("/api/v3/ticker/24hr")
        assert [ticker["symbol"] for ticker in tickers] == ["SIM00USDT", "SIM01USDT"]
        _, ticker, _ = await here.get("/fapi/v1/ticker/24hr", symbol="SIM00USDT")
        assert float(ticker["lowPrice"]) <= float(ticker["lastPrice"]) <= float(ticker["highPrice"])
        assert float(ticker["quoteVolume"]) > 0

    run_with_client(scene, symbols=2, perpetuals=1, timeframes=("1m",))


def test_weights_count_up_and_start_anew_each_minute() -> None:
    async def scene(here: ExchangeClient) -> None:
        async def used(path: str, **query: Any) -> int:
            headers = (await here.get(path, **query))[2]
            return int(headers["X-MBX-USED-WEIGHT-1M"])

        klines = {"symbol": "SIM00USDT", "interval": "1m"}
        assert await used("/api/v3/ping") == 1
        assert await used("/api/v3/klines", **klines) == 3
        assert await used("/api/v3/exchangeInfo") == 23
        assert await used("/api/v3/ticker/24hr") == 103
        assert await used("/fapi/v1/klines", **klines, limit=99) == 1
        assert await used("/fapi/v1/klines", **klines, limit=499) == 3
        assert await used("/fapi/v1/klines", **klines, limit=1000) == 8
        assert await used("/fapi/v1/klines", **klines, limit=1500) == 18
        await asyncio.sleep(60)
        assert await used("/api/v3/ping") == 1

    run_with_client(scene, symbols=1, perpetuals=1, timeframes=("1m",))


def test_too_much_is_429_and_who_goes_on_is_banned() -> None:
    async def scene(here: ExchangeClient) -> None:
        for _ in range(75):
            assert (await here.get("/api/v3/ticker/24hr"))[0] == 200
        status, error, headers = await here.get("/api/v3/ping")
        assert (status, error["code"]) == (429, -1003)
        assert int(headers["Retry-After"]) == 40  # to the end of the minute
        await asyncio.sleep(40)
        assert (await here.get("/api/v3/ping"))[0] == 200

        statuses = [(await here.get("/api/v3/ticker/24hr"))[0] for _ in range(100)]
        assert statuses == [200] * 74 + [429] * 10 + [418] * 16
        status, error, headers = await here.get("/api/v3/ping")
        assert status == 418
        assert int(headers["Retry-After"]) == 120
        await asyncio.sleep(119)
        assert (await here.get("/api/v3/ping"))[0] == 418
        await asyncio.sleep(1)
        assert (await here.get("/api/v3/ping"))[0] == 200

    run_with_client(scene, symbols=1, start=START + 20_000 - START % 60_000)


# -- websockets ----------------------------------------------------------------------------


def test_a_kline_event_has_the_venues_fields_in_their_order() -> None:
    async def scene(here: ExchangeClient) -> None:
        async with websockets.connect(f"{here.exchange.ws_url}/ws/sim00usdt@kline_1s") as socket:
            while True:
                message = await socket.recv()
                event = orjson.loads(message)
                if event["k"]["x"] and event["k"]["n"]:
                    break
        assert list(event) == ["e", "E", "s", "k"]
        assert list(event["k"]) == list("tTsifLochlvnxqVQB")
        k = event["k"]
        assert (event["e"], event["s"], k["s"], k["i"]) == ("kline", "SIM00USDT", "SIM00USDT", "1s")
        assert k["T"] == k["t"] + 999
        assert 0 < event["E"] - k["T"] < 50  # a little after the close
        assert k["L"] == k["f"] + k["n"] - 1
        truth = here.exchange.truth(Series.parse("any:SIM00/USDT:1s"), k["t"])
        assert pushed(message) == (truth[0].candle, True)

    run_with_client(scene, symbols=1, seed=3)


def test_every_bar_is_pushed_open_and_then_closed_as_in_truth_and_rest() -> None:
    series = [Series.parse(f"any:SIM0{i}/USDT:{t}") for i in range(2) for t in ("1s", "5s", "1m")]

    async def scene(here: ExchangeClient) -> None:
        names = [f"{s.symbol.replace('/', '').lower()}@kline_{s.timeframe}" for s in series]
        final: dict[str, list[Candle]] = {name: [] for name in names}
        seen: dict[str, list[Candle]] = {name: [] for name in names}
        last = dict.fromkeys(names, (0, 0.0))
        async with websockets.connect(
            f"{here.exchange.ws_url}/stream?streams={'/'.join(names)}"
        ) as ws:
            while here.exchange.clock.now() < START + 125_000:
                message = await ws.recv()
                name = orjson.loads(message)["stream"]
                bar, closed = pushed(message)
                assert bar.invalid_reason() is None
                assert (bar.time, bar.volume) >= last[name]  # in order, and volume only grows
                last[name] = (bar.time, bar.volume)
                (final if closed else seen)[name].append(bar)
        for s, name in zip(series, names, strict=True):
            truth = [bar.candle for bar in here.exchange.truth(s, final[name][0].time)]
            assert final[name] == truth[: len(final[name])]
            assert len(truth) - len(final[name]) <= 1
            by_open = {bar.time: bar for bar in final[name]}
            for bar in seen[name]:  # an open bar never shows what the closed one takes back
                if bar.time in by_open:
                    end = by_open[bar.time]
                    assert bar.open == end.open
                    assert end.low <= bar.low <= bar.high <= end.high
                    assert bar.volume <= end.volume
            _, rows, _ = await here.get(
                "/api/v3/klines",
                symbol=s.symbol.replace("/", ""),
                interval=str(s.timeframe),
                startTime=final[name][0].time,
            )
            assert [candle(row) for row in rows[: len(final[name])]] == final[name]
        assert sum(map(len, seen.values())) > 80

    run_with_client(scene, symbols=2, timeframes=("1m", "5s", "1s"), seed=4)


def test_spot_and_futures_of_one_name_are_two_markets() -> None:
    async def first(url: str) -> Candle:
        async with websockets.connect(url) as socket:
            while True:
                bar, closed = pushed(await socket.recv())
                if closed:
                    return bar

    async def scene(here: ExchangeClient) -> None:
        name = "sim00usdt@kline_1s"
        spot, *futures = await asyncio.gather(
            first(f"{here.exchange.ws_url}/ws/{name}"),
            first(f"{here.exchange.ws_url}/market/ws/{name}"),
            first(f"{here.exchange.ws_url}/market/stream?streams={name}"),
            first(f"{here.exchange.ws_url}/futures/ws/{name}"),
        )
        perpetual = here.exchange.truth(Series.parse("any:SIM00/USDT:USDT:1s"), START)[0].candle
        assert spot == here.exchange.truth(Series.parse("any:SIM00/USDT:1s"), START)[0].candle
        assert futures == [perpetual] * 3
        assert spot.open != perpetual.open

    async def alone(here: ExchangeClient) -> None:
        bar = await first(f"{here.exchange.ws_url}/ws/sim00usdt@kline_1s")
        assert bar == here.exchange.truth(Series.parse("any:SIM00/USDT:USDT:1s"), START)[0].candle

    run_with_client(scene, symbols=1, perpetuals=1)
    run_with_client(alone, symbols=0, perpetuals=1)


def test_subscriptions_are_kept_listed_and_ended() -> None:
    async def scene(here: ExchangeClient) -> None:
        async with websockets.connect(f"{here.exchange.ws_url}/ws") as socket:

            async def ask(method: str, number: Any, params: Any = ()) -> Any:
                request = {"method": method, "params": list(params), "id": number}
                await socket.send(orjson.dumps(request).decode())
                while True:
                    answer = orjson.loads(await socket.recv())
                    if "id" in answer:
                        await asyncio.sleep(0.5)
                        return answer

            a, b = "sim00usdt@kline_1s", "sim01usdt@kline_1s"
            assert await ask("SUBSCRIBE", 1, (a, b, "unknown@kline_1s")) == {
                "result": None,
                "id": 1,
            }
            listed = await ask("LIST_SUBSCRIPTIONS", "x")
            assert listed == {"result": [a, b, "unknown@kline_1s"], "id": "x"}
            assert await ask("UNSUBSCRIBE", 3, (a,)) == {"result": None, "id": 3}
            while orjson.loads(await socket.recv())["E"] < here.exchange.clock.now():
                pass  # what was on its way
            heard = {orjson.loads(await socket.recv())["s"] for _ in range(6)}
            assert heard == {"SIM01USDT"}
            assert (await ask("SET_PROPERTY", 4, ("combined", True)))["result"] is None
            assert (await ask("GET_PROPERTY", 5, ("combined",)))["result"] is True
            assert orjson.loads(await socket.recv())["stream"] == b

    run_with_client(scene, symbols=2)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("{", 3),
        ("[]", 2),
        ('{"id":1}', 2),
        ('{"method":"SUBSCRIBE","params":["a"],"id":1.5}', 2),
        ('{"method":"SUBSCRIBE","params":[1],"id":1}', 2),
        ('{"method":"SUBSCRIBE","params":"a","id":1}', 2),
        ('{"method":"SHOUT","params":[],"id":1}', 2),
        ('{"method":"GET_PROPERTY","params":["volume"],"id":1}', 0),
        ('{"method":"SET_PROPERTY","params":["combined","yes"],"id":1}', 1),
    ],
)
def test_bad_messages_get_the_venues_errors(message: str, code: int) -> None:
    async def scene(here: ExchangeClient) -> None:
        async with websockets.connect(f"{here.exchange.ws_url}/ws") as socket:
            await socket.send(message)
            assert orjson.loads(await socket.recv())["error"]["code"] == code

    run_with_client(scene, symbols=1)


def test_no_more_than_1024_streams() -> None:
    async def scene(here: ExchangeClient) -> None:
        async with websockets.connect(f"{here.exchange.ws_url}/ws") as socket:
            for number, size in enumerate((1024, 1)):
                names = [f"a{number}b{i}@kline_1s" for i in range(size)]
                request = {"method": "SUBSCRIBE", "params": names, "id": number}
                await socket.send(orjson.dumps(request).decode())
            assert orjson.loads(await socket.recv()) == {"result": None, "id": 0}
            assert orjson.loads(await socket.recv())["error"]["code"] == 2

    run_with_client(scene, symbols=1)


def test_a_sixth_message_within_a_second_ends_the_connection() -> None:
    async def scene(here: ExchangeClient) -> None:
        async with websockets.connect(f"{here.exchange.ws_url}/ws") as socket:
            for _ in range(3):
                for _ in range(5):
                    await socket.pong()
                await asyncio.sleep(1.01)
            for _ in range(6):
                await socket.pong()
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await socket.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1008

    run_with_client(scene, symbols=1)


def test_pings_come_every_20_s_and_silence_ends_the_connection() -> None:
    async def scene(here: ExchangeClient) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(f"{here.exchange.ws_url}/ws", autoping=False) as mute,
        ):
            pings = []
            while (message := await mute.receive()).type is aiohttp.WSMsgType.PING:
                pings.append(round(loop.time() - began))
            assert message.type in {aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR}
            assert pings == [20, 40, 60]
            assert loop.time() - began == pytest.approx(80, abs=1)
        async with websockets.connect(f"{here.exchange.ws_url}/ws") as polite:
            await asyncio.sleep(300)
            await polite.send("{}")
            assert await polite.recv()

    run_with_client(scene, symbols=1)


def test_connections_end_at_their_age() -> None:
    async def scene(here: ExchangeClient) -> None:
        async with websockets.connect(f"{here.exchange.ws_url}/ws") as socket:
            await asyncio.sleep(590)
            await socket.send("{}")
            assert await socket.recv()
            await asyncio.sleep(20)
            with pytest.raises(websockets.ConnectionClosed):
                await socket.recv()

    assert Faults().lifetime_seconds == 86_400
    run_with_client(scene, symbols=1, timeframes=("1h",), faults=Faults(lifetime_seconds=600))


def test_more_than_300_connections_in_5_minutes_are_refused() -> None:
    async def scene(here: ExchangeClient) -> None:
        for _ in range(300):
            async with websockets.connect(f"{here.exchange.ws_url}/ws"):
                pass
        with pytest.raises(websockets.InvalidStatus):
            await websockets.connect(f"{here.exchange.ws_url}/ws")
        await asyncio.sleep(301)
        async with websockets.connect(f"{here.exchange.ws_url}/ws"):
            pass

    run_with_client(scene, symbols=1, timeframes=("1h",))


def test_a_client_that_does_not_read_is_cut_off() -> None:
    async def scene(here: ExchangeClient) -> None:
        names = [f"sim{i:03d}usdt@kline_1s" for i in range(200)]
        port = int(here.exchange.ws_url.rpartition(":")[2])
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(upgrade(names))
        await asyncio.sleep(30)
        assert len(here.exchange._streams.connections) == 1
        await asyncio.sleep(600)  # tens of megabytes
        assert not here.exchange._streams.connections
        writer.close()

    run_with_client(scene, symbols=200, history=2, keep=100)


class SuspendedClock(LoopClock):
    """The clock of a machine that is put to sleep."""

    slept = 0

    def now(self) -> int:
        return super().now() + self.slept


def test_a_machine_that_slept_goes_on_from_now() -> None:
    async def main() -> None:
        clock = SuspendedClock(START)
        faults = Faults(late=0.5, late_seconds=60, duplicate=0.5, revised=0.5)
        async with (
            SimulatedExchange(2, clock=clock, history=2, keep=100, faults=faults) as exchange,
            websockets.connect(f"{exchange.ws_url}/ws/sim00usdt@kline_1s") as socket,
        ):
            await asyncio.sleep(30)
            clock.slept = 10_000_000
            await asyncio.sleep(5)
            while True:
                event = orjson.loads(await socket.recv())
                if event["k"]["t"] > START + 10_031_000:
                    return

    run_virtual(main())


# -- cost ----------------------------------------------------------------------------------


async def test_300_symbols_cost_a_fraction_of_a_core(record_property: Any) -> None:
    """300 streams of 1 s and 300 of 1 m bars, in real time, measured by CPU time."""
    clock = SystemClock()
    async with SimulatedExchange(300, timeframes=("1s", "1m"), history=2, clock=clock) as exchange:
        names = [f"sim{i:03d}usdt@kline_{t}" for i in range(300) for t in ("1s", "1m")]
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", int(exchange.ws_url.rpartition(":")[2])
        )
        writer.write(upgrade(names))  # by hand, so that the client costs next to nothing
        await reader.readuntil(b"\r\n\r\n")
        finals, used, began = 0, time.process_time(), time.monotonic()
        while time.monotonic() - began < 4:
            finals += (await reader.read(1 << 20)).count(b'"x":true')
        share = (time.process_time() - used) / (time.monotonic() - began)
        writer.close()
    record_property("cpu_share", share)
    assert finals >= 3 * 300
    assert share < 0.25
