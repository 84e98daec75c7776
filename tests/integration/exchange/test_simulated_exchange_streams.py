"""WebSocket streams of the simulated exchange: messages and limits of the venue's documentation."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
import orjson
import pytest
import websockets

from kronos_stream.market.candle import Candle
from kronos_stream.market.clock import LoopClock, SystemClock
from kronos_stream.market.series import Series
from kronos_stream.testing.exchange import Faults, SimulatedExchange
from tests.support.exchange_client import (
    START,
    event_candle,
    exchange_client,
    handshake,
    row_candle,
)


@pytest.mark.virtual_time
async def test_kline_event_has_the_documented_fields_in_order() -> None:
    async with exchange_client(symbols=1, seed=3) as client:
        async with websockets.connect(f"{client.exchange.ws_url}/ws/sim00usdt@kline_1s") as socket:
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
        truth = client.exchange.truth(Series.parse("any:SIM00/USDT:1s"), k["t"])
        assert event_candle(message) == (truth[0].candle, True)


@pytest.mark.virtual_time
async def test_bars_are_pushed_open_then_closed_and_equal_truth_and_rest() -> None:
    series = [Series.parse(f"any:SIM0{i}/USDT:{t}") for i in range(2) for t in ("1s", "5s", "1m")]

    async with exchange_client(symbols=2, timeframes=("1m", "5s", "1s"), seed=4) as client:
        names = [f"{s.symbol.replace('/', '').lower()}@kline_{s.timeframe}" for s in series]
        final: dict[str, list[Candle]] = {name: [] for name in names}
        seen: dict[str, list[Candle]] = {name: [] for name in names}
        last = dict.fromkeys(names, (0, 0.0))
        async with websockets.connect(
            f"{client.exchange.ws_url}/stream?streams={'/'.join(names)}"
        ) as ws:
            while client.exchange.clock.now() < START + 125_000:
                message = await ws.recv()
                name = orjson.loads(message)["stream"]
                bar, closed = event_candle(message)
                assert bar.invalid_reason() is None
                assert (bar.time, bar.volume) >= last[name]  # in order, and volume only grows
                last[name] = (bar.time, bar.volume)
                (final if closed else seen)[name].append(bar)
        for s, name in zip(series, names, strict=True):
            truth = [bar.candle for bar in client.exchange.truth(s, final[name][0].time)]
            assert final[name] == truth[: len(final[name])]
            assert len(truth) - len(final[name]) <= 1
            by_open = {bar.time: bar for bar in final[name]}
            for bar in seen[name]:  # an open bar never shows what the closed one takes back
                if bar.time in by_open:
                    end = by_open[bar.time]
                    assert bar.open == end.open
                    assert end.low <= bar.low <= bar.high <= end.high
                    assert bar.volume <= end.volume
            _, rows, _ = await client.get(
                "/api/v3/klines",
                symbol=s.symbol.replace("/", ""),
                interval=str(s.timeframe),
                startTime=final[name][0].time,
            )
            assert [row_candle(row) for row in rows[: len(final[name])]] == final[name]
        assert sum(map(len, seen.values())) > 80


@pytest.mark.virtual_time
async def test_spot_and_futures_of_the_same_name_are_two_markets() -> None:
    async def first(url: str) -> Candle:
        async with websockets.connect(url) as socket:
            while True:
                bar, closed = event_candle(await socket.recv())
                if closed:
                    return bar

    async with exchange_client(symbols=1, perpetuals=1) as client:
        name = "sim00usdt@kline_1s"
        spot, *futures = await asyncio.gather(
            first(f"{client.exchange.ws_url}/ws/{name}"),
            first(f"{client.exchange.ws_url}/market/ws/{name}"),
            first(f"{client.exchange.ws_url}/market/stream?streams={name}"),
            first(f"{client.exchange.ws_url}/futures/ws/{name}"),
        )
        perpetual = client.exchange.truth(Series.parse("any:SIM00/USDT:USDT:1s"), START)[0].candle
        assert spot == client.exchange.truth(Series.parse("any:SIM00/USDT:1s"), START)[0].candle
        assert futures == [perpetual] * 3
        assert spot.open != perpetual.open

    async with exchange_client(symbols=0, perpetuals=1) as client:
        bar = await first(f"{client.exchange.ws_url}/ws/sim00usdt@kline_1s")
        assert bar == client.exchange.truth(Series.parse("any:SIM00/USDT:USDT:1s"), START)[0].candle


@pytest.mark.virtual_time
async def test_subscriptions_can_be_added_listed_and_removed() -> None:
    async with (
        exchange_client(symbols=2) as client,
        websockets.connect(f"{client.exchange.ws_url}/ws") as socket,
    ):

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
        while orjson.loads(await socket.recv())["E"] < client.exchange.clock.now():
            pass  # what was on its way
        received = {orjson.loads(await socket.recv())["s"] for _ in range(6)}
        assert received == {"SIM01USDT"}
        assert (await ask("SET_PROPERTY", 4, ("combined", True)))["result"] is None
        assert (await ask("GET_PROPERTY", 5, ("combined",)))["result"] is True
        assert orjson.loads(await socket.recv())["stream"] == b


@pytest.mark.virtual_time
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
async def test_invalid_message_gets_the_documented_error(message: str, code: int) -> None:
    async with (
        exchange_client(symbols=1) as client,
        websockets.connect(f"{client.exchange.ws_url}/ws") as socket,
    ):
        await socket.send(message)
        assert orjson.loads(await socket.recv())["error"]["code"] == code


@pytest.mark.virtual_time
async def test_connection_takes_at_most_1024_streams() -> None:
    async with (
        exchange_client(symbols=1) as client,
        websockets.connect(f"{client.exchange.ws_url}/ws") as socket,
    ):
        for number, size in enumerate((1024, 1)):
            names = [f"a{number}b{i}@kline_1s" for i in range(size)]
            request = {"method": "SUBSCRIBE", "params": names, "id": number}
            await socket.send(orjson.dumps(request).decode())
        assert orjson.loads(await socket.recv()) == {"result": None, "id": 0}
        assert orjson.loads(await socket.recv())["error"]["code"] == 2


@pytest.mark.virtual_time
async def test_sixth_message_within_a_second_closes_the_connection() -> None:
    async with (
        exchange_client(symbols=1) as client,
        websockets.connect(f"{client.exchange.ws_url}/ws") as socket,
    ):
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


@pytest.mark.virtual_time
async def test_pings_are_sent_every_20_s_and_a_missing_pong_closes_the_connection() -> None:
    async with exchange_client(symbols=1) as client:
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(f"{client.exchange.ws_url}/ws", autoping=False) as mute,
        ):
            pings = []
            while (message := await mute.receive()).type is aiohttp.WSMsgType.PING:
                pings.append(round(loop.time() - began))
            assert message.type in {aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR}
            assert pings == [20, 40, 60]
            assert loop.time() - began == pytest.approx(80, abs=1)
        async with websockets.connect(f"{client.exchange.ws_url}/ws") as polite:
            await asyncio.sleep(300)
            await polite.send("{}")
            assert await polite.recv()


@pytest.mark.virtual_time
async def test_connection_is_closed_at_the_end_of_its_lifetime() -> None:
    async with (
        exchange_client(
            symbols=1, timeframes=("1h",), faults=Faults(lifetime_seconds=600)
        ) as client,
        websockets.connect(f"{client.exchange.ws_url}/ws") as socket,
    ):
        await asyncio.sleep(590)
        await socket.send("{}")
        assert await socket.recv()
        await asyncio.sleep(20)
        with pytest.raises(websockets.ConnectionClosed):
            await socket.recv()

    assert Faults().lifetime_seconds == 86_400


@pytest.mark.virtual_time
async def test_more_than_300_connections_in_5_minutes_are_refused() -> None:
    async with exchange_client(symbols=1, timeframes=("1h",)) as client:
        for _ in range(300):
            async with websockets.connect(f"{client.exchange.ws_url}/ws"):
                pass
        with pytest.raises(websockets.InvalidStatus):
            await websockets.connect(f"{client.exchange.ws_url}/ws")
        await asyncio.sleep(301)
        async with websockets.connect(f"{client.exchange.ws_url}/ws"):
            pass


@pytest.mark.virtual_time
async def test_client_that_does_not_read_is_disconnected() -> None:
    async with exchange_client(symbols=200, history=2, keep=100) as client:
        names = [f"sim{i:03d}usdt@kline_1s" for i in range(200)]
        port = int(client.exchange.ws_url.rpartition(":")[2])
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(handshake(names))
        await asyncio.sleep(30)
        assert len(client.exchange._streams.connections) == 1
        await asyncio.sleep(600)  # tens of megabytes
        assert not client.exchange._streams.connections
        writer.close()


class SuspendedClock(LoopClock):
    """Clock of a machine that was suspended for a while."""

    suspended_ms = 0

    def now(self) -> int:
        return super().now() + self.suspended_ms


@pytest.mark.virtual_time
async def test_a_suspended_machine_continues_at_the_present_time() -> None:
    clock = SuspendedClock(START)
    faults = Faults(late=0.5, late_seconds=60, duplicate=0.5, revised=0.5)
    async with (
        SimulatedExchange(2, clock=clock, history=2, keep=100, faults=faults) as exchange,
        websockets.connect(f"{exchange.ws_url}/ws/sim00usdt@kline_1s") as socket,
    ):
        await asyncio.sleep(30)
        clock.suspended_ms = 2_000_000
        await asyncio.sleep(5)
        while orjson.loads(await socket.recv())["k"]["t"] <= START + 2_031_000:
            pass


@pytest.mark.soak
async def test_300_symbols_use_a_fraction_of_a_core(record_property: Any) -> None:
    """CPU time of 300 streams of 1 s bars and 300 of 1 m bars, in real time."""
    clock = SystemClock()
    async with SimulatedExchange(300, timeframes=("1s", "1m"), history=2, clock=clock) as exchange:
        names = [f"sim{i:03d}usdt@kline_{t}" for i in range(300) for t in ("1s", "1m")]
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", int(exchange.ws_url.rpartition(":")[2])
        )
        writer.write(handshake(names))  # a library would take CPU time
        await reader.readuntil(b"\r\n\r\n")
        finals, used, began = 0, time.process_time(), time.monotonic()
        while time.monotonic() - began < 4:
            finals += (await reader.read(1 << 20)).count(b'"x":true')
        share = (time.process_time() - used) / (time.monotonic() - began)
        writer.close()
    record_property("cpu_share", share)
    assert finals >= 3 * 300
    assert share < 0.25
