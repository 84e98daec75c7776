"""Faults of connections and of REST, and a wrong clock, of the simulated exchange."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import orjson
import pytest
import websockets

from kronos_stream.testing.exchange import (
    Faults,
    SimulatedExchange,
)
from tests.support.exchange_recording import (
    START,
    STREAMS,
    Recording,
    planned,
    record_streams,
    record_with_faults,
    run_exchange,
)


def test_drop_closes_the_connection() -> None:
    recording = record_with_faults(planned("drop", 5), 20)
    assert 4000 < recording.messages[-1][0] <= 5000
    runs = [record_with_faults(Faults(seed=seed, drop=360), 100).messages for seed in range(8)]
    lasted = [messages[-1][0] if messages else 0 for messages in runs]
    assert len({ms // 1000 for ms in lasted}) > 4  # 10 s on average
    assert 2_000 < sum(lasted) / 8 < 30_000


def test_stalled_connection_stays_open_without_messages() -> None:
    async def scene(exchange: SimulatedExchange) -> tuple[list[float], float]:
        loop = asyncio.get_running_loop()
        recording: list[float] = []
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(f"{exchange.ws_url}/ws/{STREAMS[0]}", autoping=False) as socket,
        ):
            while True:
                message = await socket.receive()
                if message.type in {aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR}:
                    return recording, loop.time()
                recording.append(loop.time())

    recording, ended = run_exchange(planned("stall", 5, stall_seconds=90), scene)
    assert 4 < max(recording) <= 5
    assert ended == pytest.approx(95, abs=0.1)


def test_handshakes_fail_in_several_ways() -> None:
    async def scene(exchange: SimulatedExchange) -> set[str]:
        ways = set()
        for _ in range(24):
            try:
                url = f"{exchange.ws_url}/ws/{STREAMS[0]}"
                async with websockets.connect(url, open_timeout=8) as socket:
                    await socket.recv()
                    ways.add("fine")
            except (OSError, websockets.WebSocketException, EOFError) as error:
                ways.add(type(error).__name__)
        return ways

    ways = run_exchange(Faults(seed=3, handshake=0.7), scene)
    assert {"fine", "InvalidStatus", "TimeoutError"} <= ways
    assert len(ways) >= 5  # and connections cut before and after it
    assert run_exchange(Faults(), scene) == {"fine"}


def test_server_shutdown_is_announced_before_it_happens() -> None:
    async def scene(exchange: SimulatedExchange) -> tuple[Recording, Recording]:
        async def later() -> Recording:
            await asyncio.sleep(8)
            return await record_streams(exchange, 20)

        old, new = await asyncio.gather(record_streams(exchange, 60), later())
        return old, new

    old, new = run_exchange(planned("shutdown", 5), scene)
    events = [(at, orjson.loads(m)) for at, m in old.messages if b"serverShutdown" in m]
    assert events == [(5000, {"e": "serverShutdown", "E": START + 5000})]
    assert 14_000 < old.messages[-1][0] <= 15_000  # klines continue for ten seconds
    assert new.messages[-1][0] > 27_000


def fetch(faults: Faults, requests: int, path: str = "/api/v3/time", gap: float = 1.0) -> list[Any]:
    """(status, body, seconds, Retry-After) of successive requests; None without a response."""

    async def scene(exchange: SimulatedExchange) -> list[Any]:
        loop = asyncio.get_running_loop()
        answers: list[Any] = []
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as http:
            for _ in range(requests):
                began = loop.time()
                try:
                    async with http.get(exchange.rest_url + path) as answer:
                        took = loop.time() - began
                        after = int(answer.headers.get("Retry-After", 0))
                        answers.append((answer.status, await answer.read(), took, after))
                except (TimeoutError, aiohttp.ClientError):
                    answers.append(None)
                await asyncio.sleep(gap)
        return answers

    answers: list[Any] = run_exchange(faults, scene)
    return answers


def test_rest_fails_with_several_statuses() -> None:
    statuses = [answer[0] for answer in fetch(Faults(error=0.5), 40)]
    assert {500, 502, 503, 504, 200} == set(statuses)
    assert 10 < statuses.count(200) < 30


def test_rest_times_out_or_is_slow() -> None:
    first, second = fetch(planned("timeout", 0, seconds=1), 2)
    assert first is None
    assert second[0] == 200
    slow = fetch(planned("slow", 0, seconds=1), 1)[0]
    assert slow[0] == 200
    assert 1.5 <= slow[2] <= 4.5


def test_mangled_responses_are_never_valid_rows() -> None:
    path = "/api/v3/klines?symbol=SIM00USDT&interval=1s"
    bodies = {answer[1] for answer in fetch(Faults(mangled=1.0), 20, path)}

    def rows(body: bytes) -> bool:
        try:
            return all(len(row) == 12 for row in orjson.loads(body))
        except (orjson.JSONDecodeError, TypeError):
            return False

    assert len(bodies) > 4
    assert not any(rows(body) for body in bodies)


@pytest.mark.parametrize(("kind", "status"), [("limited", 429), ("banned", 418)])
def test_refusals_come_in_bursts(kind: str, status: int) -> None:
    answers = fetch(planned(kind, 3, seconds=5), 12)
    assert [answer[0] for answer in answers] == [200] * 3 + [status] * 5 + [200] * 4
    assert [answer[3] for answer in answers][3:8] == [5, 4, 3, 2, 1]
    assert orjson.loads(answers[3][1])["code"] == -1003
    often = fetch(Faults.parse(f'{{"{kind}": 60, "{kind}_seconds": 10}}'), 300)
    assert 0.05 < [answer[0] for answer in often].count(status) / 300 < 0.4


def test_clock_has_skew_and_drift() -> None:
    def times(faults: Faults) -> list[int]:
        return [
            orjson.loads(a[1])["serverTime"] - START - 1000 * i
            for i, a in enumerate(fetch(faults, 101))
        ]

    assert set(times(Faults())) == {0}
    assert set(times(Faults(skew_seconds=-2.5))) == {-2500}
    drifting = times(Faults(skew_seconds=1, drift_ppm=1000))
    assert drifting[0] == 1000
    assert drifting[-1] == 1100


def test_bars_close_by_the_clock_of_the_exchange() -> None:
    async def scene(exchange: SimulatedExchange) -> list[tuple[float, bytes]]:
        loop = asyncio.get_running_loop()
        recording = []
        async with websockets.connect(f"{exchange.ws_url}/ws/{STREAMS[0]}") as socket:
            while loop.time() < 5:
                message = await socket.recv(decode=False)
                recording.append((loop.time(), message))
        return recording

    for at, message in run_exchange(Faults(skew_seconds=0.6), scene):
        event = orjson.loads(message)
        assert event["E"] == START + round(at * 1000) + 600
        if event["k"]["x"]:
            assert 0 < event["E"] - event["k"]["T"] < 50
