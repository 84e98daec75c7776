"""REST of the simulated exchange: fields, limits and errors of the venue's public documentation."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kronos_stream.market.series import Series
from tests.support.exchange_client import START, exchange_client, row_candle

pytestmark = pytest.mark.virtual_time


async def test_time_and_ping_answer() -> None:
    async with exchange_client(symbols=1) as client:
        await asyncio.sleep(12.5)
        for prefix in ("/api/v3", "/fapi/v1"):
            assert (await client.get(f"{prefix}/time"))[1] == {"serverTime": START + 12_500}
            assert (await client.get(f"{prefix}/ping"))[1] == {}


async def test_exchange_info_lists_trading_symbols() -> None:
    async with exchange_client(symbols=3, perpetuals=2) as client:
        _, info, _ = await client.get("/api/v3/exchangeInfo")
        assert [s["symbol"] for s in info["symbols"]] == ["SIM00USDT", "SIM01USDT", "SIM02USDT"]
        for listed in info["symbols"]:
            assert (listed["status"], listed["quoteAsset"]) == ("TRADING", "USDT")
            assert listed["baseAsset"] + "USDT" == listed["symbol"]
        assert info["rateLimits"][0]["limit"] == 6000
        _, one, _ = await client.get("/api/v3/exchangeInfo", symbol="SIM01USDT")
        assert [s["symbol"] for s in one["symbols"]] == ["SIM01USDT"]
        _, two, _ = await client.get("/api/v3/exchangeInfo", symbols='["SIM02USDT","SIM00USDT"]')
        assert [s["symbol"] for s in two["symbols"]] == ["SIM02USDT", "SIM00USDT"]
        _, futures, _ = await client.get("/fapi/v1/exchangeInfo")
        assert [s["contractType"] for s in futures["symbols"]] == ["PERPETUAL"] * 2
        assert futures["rateLimits"][0]["limit"] == 2400


async def test_klines_are_rows_of_twelve_values_with_decimal_strings() -> None:
    async with exchange_client(symbols=2) as client:
        await asyncio.sleep(3.5)
        status, rows, _ = await client.get(
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
            assert row_candle(row).invalid_reason() is None
        truth = client.exchange.truth(Series.parse("any:SIM00/USDT:1s"), START)
        # The last row is the unfinished one, which the truth does not have yet.
        assert [row_candle(row) for row in rows[:-1]] == [bar.candle for bar in truth]


async def test_klines_respect_times_and_limit() -> None:
    async with exchange_client(symbols=1, perpetuals=1, timeframes=("1m",), history=1600) as client:

        async def opens(path: str = "/api/v3/klines", **query: Any) -> list[int]:
            rows = (await client.get(path, symbol="SIM00USDT", interval="1m", **query))[1]
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
        status, error, _ = await client.get(
            "/fapi/v1/klines", symbol="SIM00USDT", interval="1m", limit=1501
        )
        assert (status, error["code"]) == (400, -1130)


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
async def test_invalid_request_gets_the_documented_error(query: dict[str, str], code: int) -> None:
    async with exchange_client(symbols=1) as client:
        status, error, _ = await client.get("/api/v3/klines", **query)
        assert (status, error["code"]) == (400, code)
        assert error["msg"]


async def test_tickers_cover_a_day() -> None:
    async with exchange_client(symbols=2, perpetuals=1, timeframes=("1m",)) as client:
        _, tickers, _ = await client.get("/api/v3/ticker/24hr")
        assert [ticker["symbol"] for ticker in tickers] == ["SIM00USDT", "SIM01USDT"]
        _, ticker, _ = await client.get("/fapi/v1/ticker/24hr", symbol="SIM00USDT")
        assert float(ticker["lowPrice"]) <= float(ticker["lastPrice"]) <= float(ticker["highPrice"])
        assert float(ticker["quoteVolume"]) > 0


async def test_weights_add_up_and_reset_each_minute() -> None:
    async with exchange_client(symbols=1, perpetuals=1, timeframes=("1m",)) as client:

        async def used(path: str, **query: Any) -> int:
            headers = (await client.get(path, **query))[2]
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


async def test_exceeding_the_limit_is_429_and_ignoring_it_bans() -> None:
    async with exchange_client(symbols=1, start=START + 20_000 - START % 60_000) as client:
        for _ in range(75):
            assert (await client.get("/api/v3/ticker/24hr"))[0] == 200
        status, error, headers = await client.get("/api/v3/ping")
        assert (status, error["code"]) == (429, -1003)
        assert int(headers["Retry-After"]) == 40  # to the end of the minute
        await asyncio.sleep(40)
        assert (await client.get("/api/v3/ping"))[0] == 200

        statuses = [(await client.get("/api/v3/ticker/24hr"))[0] for _ in range(100)]
        assert statuses == [200] * 74 + [429] * 10 + [418] * 16
        status, error, headers = await client.get("/api/v3/ping")
        assert status == 418
        assert int(headers["Retry-After"]) == 120
        await asyncio.sleep(119)
        assert (await client.get("/api/v3/ping"))[0] == 418
        await asyncio.sleep(1)
        assert (await client.get("/api/v3/ping"))[0] == 200
