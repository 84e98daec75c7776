"""Each fault of the simulated exchange is seen on the wire, and comes again with its seed."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp
import orjson
import pytest
import websockets

from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.clock import LoopClock
from kronos_stream.market.series import Series
from kronos_stream.testing.exchange import (
    PRESETS,
    Faults,
    FaultsError,
    PlannedFault,
    SimulatedExchange,
)
from kronos_stream.testing.virtual_time import run_virtual

START = 1_750_000_000_000
NAMES = [f"sim0{i}usdt@kline_1s" for i in range(4)]


@dataclass
class PushedKline:
    """An event that can be taken at its word."""

    at: int
    """When it came, ms after the start; so with all times here."""
    event: int
    candle: Candle
    closed: bool


@dataclass
class RecordedMessages:
    """All that a client heard, and what was true."""

    messages: list[tuple[int, bytes]] = field(default_factory=list)
    klines: dict[str, list[PushedKline]] = field(default_factory=lambda: defaultdict(list))
    """By stream."""
    invalid: list[bytes] = field(default_factory=list)
    true_bars: dict[str, list[Bar]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def finals(self, stream: str, opened: int) -> list[PushedKline]:
        return [k for k in self.klines[stream] if k.closed and k.candle.time == START + opened]


def parse_push(message: bytes) -> tuple[str, int, Candle, bool] | None:
    """A strict reader: stream, event time, candle, closed; None for what cannot be."""
    try:
        wrapper = orjson.loads(message)
        event = wrapper["data"]
        k = event["k"]
        numbers = [k[name] for name in "ohlcvq"]
        if not all(isinstance(number, str) for number in numbers):
            return None
        candle = Candle(k["t"], *map(float, numbers))
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None
    right_time = isinstance(k["t"], int) and 0 < k["t"] < event["E"] and k["t"] % 1000 == 0
    if wrapper["stream"] not in NAMES or candle.invalid_reason() is not None or not right_time:
        return None
    return wrapper["stream"], event["E"] - START, candle, k["x"]


async def record_stream(exchange: SimulatedExchange, seconds: float) -> RecordedMessages:
    """Hear all four streams over one connection for so long, or until it ends."""
    heard = RecordedMessages()
    url = f"{exchange.ws_url}/stream?streams={'/'.join(NAMES)}"
    try:
        async with asyncio.timeout(seconds), websockets.connect(url, ping_interval=None) as ws:
            async for text in ws:
                message = text.encode() if isinstance(text, str) else text
                at = exchange.clock.now() - START
                heard.messages.append((at, message))
                known = parse_push(message)
                if known is None:
                    heard.invalid.append(message)
                else:
                    heard.klines[known[0]].append(PushedKline(at, *known[1:]))
    except (OSError, EOFError, websockets.WebSocketException):  # a timeout is an OSError
        pass
    for i, name in enumerate(NAMES):
        series = Series.parse(f"any:SIM0{i}/USDT:1s")
        heard.true_bars[name] = exchange.truth(series, START)
    heard.counts = dict(exchange.fault_injector.counts)
    return heard


def play(
    faults: Faults, scene: Callable[[SimulatedExchange], Awaitable[Any]], **options: Any
) -> Any:
    async def main() -> Any:
        exchange = SimulatedExchange(
            **{"symbols": 4, "history": 20, "seed": 2, "faults": faults, **options},
            clock=LoopClock(START),
        )
        async with exchange:
            return await scene(exchange)

    return run_virtual(main())


def record_with_faults(faults: Faults, seconds: float = 30) -> RecordedMessages:
    heard: RecordedMessages = play(faults, lambda exchange: record_stream(exchange, seconds))
    return heard


async def opens(exchange: SimulatedExchange, symbol: str = "SIM00USDT") -> list[int]:
    """Opens of the bars that REST has, ms after the start."""
    url = f"{exchange.rest_url}/api/v3/klines?symbol={symbol}&interval=1s&startTime={START}"
    async with aiohttp.ClientSession() as http, http.get(url) as answer:
        return [row[0] - START for row in await answer.json()]


def planned(kind: str, at: float, seconds: float = 0, symbol: str = "", **more: Any) -> Faults:
    return Faults(plan=(PlannedFault(kind, at, seconds, symbol),), **more)


# -- bars ----------------------------------------------------------------------------------


def test_without_faults_every_bar_is_closed_once_and_in_order() -> None:
    heard = record_with_faults(Faults())
    assert heard.invalid == []
    for name in NAMES:
        finals = [k.candle for k in heard.klines[name] if k.closed]
        assert finals == [bar.candle for bar in heard.true_bars[name]][: len(finals)]
        assert len(finals) >= 29
    assert heard.counts == {}


def test_missing_final() -> None:
    async def scene(exchange: SimulatedExchange) -> tuple[RecordedMessages, list[int]]:
        return await record_stream(exchange, 10), await opens(exchange)

    heard, rows = play(planned("missing_final", 5, symbol="SIM00/USDT"), scene)
    assert heard.finals(NAMES[0], 4000) == []
    assert len(heard.finals(NAMES[0], 5000)) == len(heard.finals(NAMES[1], 4000)) == 1
    assert 4000 in rows
    assert heard.counts == {"missing_final": 1}


def test_duplicate() -> None:
    heard = record_with_faults(planned("duplicate", 5, symbol="SIM00/USDT"), 10)
    first, second = heard.finals(NAMES[0], 4000)
    assert first.candle == second.candle
    assert second.at - first.at == 300
    assert len(heard.finals(NAMES[0], 5000)) == 1


def test_revised() -> None:
    async def scene(
        exchange: SimulatedExchange,
    ) -> tuple[RecordedMessages, list[Candle], list[Any]]:
        heard = await record_stream(exchange, 10)
        series = Series.parse("any:SIM00/USDT:1s")
        url = f"{exchange.rest_url}/api/v3/klines?symbol=SIM00USDT&interval=1s"
        async with (
            aiohttp.ClientSession() as http,
            http.get(f"{url}&startTime={START + 4000}&limit=1") as answer,
        ):
            return heard, exchange.versions(series, START + 4000), await answer.json()

    heard, versions, rows = play(planned("revised", 5, symbol="SIM00/USDT"), scene)
    first, second = heard.finals(NAMES[0], 4000)
    assert second.at - first.at == 2000
    assert [first.candle, second.candle] == versions
    assert first.candle.close != second.candle.close
    assert second.candle.fault() is None
    assert heard.truth[NAMES[0]][4] == Bar(second.candle, revision=1)
    assert [float(number) for number in rows[0][1:6]] == list(second.candle[1:6])


def test_late() -> None:
    async def scene(exchange: SimulatedExchange) -> tuple[RecordedMessages, list[int]]:
        listening = asyncio.create_task(record_stream(exchange, 12))
        await asyncio.sleep(5.5)
        rows = await opens(exchange)
        return await listening, rows

    heard, rows = play(planned("late", 5, symbol="SIM00/USDT"), scene)
    (final,) = heard.finals(NAMES[0], 4000)
    assert 8000 <= final.at <= 8050  # three seconds
    assert final.event == final.at
    assert 4000 in rows
    assert len(heard.finals(NAMES[0], 5000)) == 1


def test_disorder_is_a_final_overtaken_or_overtaking() -> None:
    heard = record_with_faults(Faults(seed=1, disorder=0.5), 60)
    overtaken = overtaking = 0
    for klines in heard.klines.values():
        for a, b in pairwise(klines):
            overtaken += b.closed and a.candle.time > b.candle.time
            overtaking += a.closed and not b.closed and a.candle.time == b.candle.time
    assert overtaken > 5
    assert overtaking > 5
    for name in NAMES:  # and yet nothing is lost
        finals = {k.candle for k in heard.klines[name] if k.closed}
        assert {bar.candle for bar in heard.true_bars[name][:-3]} <= finals


def test_a_hidden_bar_appears_later_in_rest() -> None:
    async def scene(exchange: SimulatedExchange) -> list[list[int]]:
        found = []
        for _ in range(3):
            await asyncio.sleep(2.75)
            found.append(await opens(exchange))
        return found

    early, hidden, there = play(planned("hidden", 5), scene)
    assert early == [0, 1000, 2000]
    assert hidden == [0, 1000, 2000, 3000, 5000]
    assert there == list(range(0, 9000, 1000))


def test_a_lost_bar_is_nowhere_and_synthetic_in_truth() -> None:
    async def scene(exchange: SimulatedExchange) -> tuple[RecordedMessages, list[int]]:
        return await record_stream(exchange, 20), await opens(exchange)

    heard, rows = play(planned("lost", 5, seconds=2.5, symbol="SIM00/USDT"), scene)
    assert [ms for ms in range(0, 20_000, 1000) if ms not in rows] == [4000, 5000, 6000]
    times = {k.candle.time - START for k in heard.klines[NAMES[0]]}
    assert not times & {4000, 5000, 6000}
    assert {3000, 7000} <= times
    truth = heard.truth[NAMES[0]]
    close = truth[3].candle.close
    assert [bar.synthetic for bar in truth[3:8]] == [False, True, True, True, False]
    assert truth[5].candle == Candle(START + 5000, close, close, close, close, 0.0, 0.0)
    assert not any(bar.synthetic for bar in heard.truth[NAMES[1]])


def test_garbage_is_never_taken_for_a_candle_by_a_strict_reader() -> None:
    heard = record_with_faults(Faults(seed=5, garbage=0.5), 120)
    assert len(heard.invalid) > 150
    assert len(set(heard.invalid)) > 50
    closed = {(name, bar.candle) for name in NAMES for bar in heard.true_bars[name]}
    for name in NAMES:
        finals = [k.candle for k in heard.klines[name] if k.closed]
        assert {(name, candle) for candle in finals} <= closed
        assert len(finals) < len(heard.true_bars[name]) - 10  # some came in place of the last word


def test_silence_of_one_symbol_among_live_ones() -> None:
    async def scene(exchange: SimulatedExchange) -> tuple[RecordedMessages, list[int]]:
        return await record_stream(exchange, 20), await opens(exchange)

    faults = planned("silence", 5, seconds=6, symbol="SIM00/USDT")
    heard, rows = play(faults, scene)
    assert not [k for k in heard.klines[NAMES[0]] if 5000 <= k.at < 11_000]
    assert [k for k in heard.klines[NAMES[0]] if k.at >= 11_000]
    for name in NAMES[1:]:
        assert len([k for k in heard.klines[name] if k.closed and 5000 <= k.at < 11_000]) == 6
    assert rows == list(range(0, 21_000, 1000))


# -- connections ---------------------------------------------------------------------------


def test_drop() -> None:
    heard = record_with_faults(planned("drop", 5), 20)
    assert 4000 < heard.messages[-1][0] <= 5000
    heards = [record_with_faults(Faults(seed=seed, drop=360), 100).messages for seed in range(8)]
    lasted = [messages[-1][0] if messages else 0 for messages in heards]
    assert len({ms // 1000 for ms in lasted}) > 4  # 10 s on average
    assert 2_000 < sum(lasted) / 8 < 30_000


def test_a_stalled_connection_says_nothing_more_but_stays() -> None:
    async def scene(exchange: SimulatedExchange) -> tuple[list[float], float]:
        loop = asyncio.get_running_loop()
        heard: list[float] = []
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(f"{exchange.ws_url}/ws/{NAMES[0]}", autoping=False) as socket,
        ):
            while True:
                message = await socket.receive()
                if message.type in {aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR}:
                    return heard, loop.time()
                heard.append(loop.time())

    heard, ended = play(planned("stall", 5, stall_seconds=90), scene)
    assert 4 < max(heard) <= 5
    assert ended == pytest.approx(95, abs=0.1)


def test_handshakes_fail_in_several_ways() -> None:
    async def scene(exchange: SimulatedExchange) -> set[str]:
        ways = set()
        for _ in range(24):
            try:
                url = f"{exchange.ws_url}/ws/{NAMES[0]}"
                async with websockets.connect(url, open_timeout=8) as socket:
                    await socket.recv()
                    ways.add("fine")
            except (OSError, websockets.WebSocketException, EOFError) as error:
                ways.add(type(error).__name__)
        return ways

    ways = play(Faults(seed=3, handshake=0.7), scene)
    assert {"fine", "InvalidStatus", "TimeoutError"} <= ways
    assert len(ways) >= 5  # and cut before and after
    assert play(Faults(), scene) == {"fine"}


def test_server_shutdown_is_announced_and_then_happens() -> None:
    async def scene(exchange: SimulatedExchange) -> tuple[RecordedMessages, RecordedMessages]:
        async def later() -> RecordedMessages:
            await asyncio.sleep(8)
            return await record_stream(exchange, 20)

        old, new = await asyncio.gather(record_stream(exchange, 60), later())
        return old, new

    old, new = play(planned("shutdown", 5), scene)
    events = [(at, orjson.loads(m)) for at, m in old.messages if b"serverShutdown" in m]
    assert events == [(5000, {"e": "serverShutdown", "E": START + 5000})]
    assert 14_000 < old.messages[-1][0] <= 15_000  # ten seconds' notice, and klines meanwhile
    assert new.messages[-1][0] > 27_000


# -- REST ----------------------------------------------------------------------------------


def fetch(faults: Faults, requests: int, path: str = "/api/v3/time", gap: float = 1.0) -> list[Any]:
    """(status, body, seconds it took) of requests one after another; None for no answer."""

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

    answers: list[Any] = play(faults, scene)
    return answers


def test_errors_of_rest() -> None:
    statuses = [answer[0] for answer in fetch(Faults(error=0.5), 40)]
    assert {500, 502, 503, 504, 200} == set(statuses)
    assert 10 < statuses.count(200) < 30


def test_rest_that_does_not_answer_or_slowly() -> None:
    first, second = fetch(planned("timeout", 0, seconds=1), 2)
    assert first is None
    assert second[0] == 200
    slow = fetch(planned("slow", 0, seconds=1), 1)[0]
    assert slow[0] == 200
    assert 1.5 <= slow[2] <= 4.5


def test_mangled_answers() -> None:
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
def test_bursts_of_refusals(kind: str, status: int) -> None:
    answers = fetch(planned(kind, 3, seconds=5), 12)
    assert [answer[0] for answer in answers] == [200] * 3 + [status] * 5 + [200] * 4
    assert [answer[3] for answer in answers][3:8] == [5, 4, 3, 2, 1]
    assert orjson.loads(answers[3][1])["code"] == -1003
    often = fetch(Faults.parse(f'{{"{kind}": 60, "{kind}_seconds": 10}}'), 300)
    assert 0.05 < [answer[0] for answer in often].count(status) / 300 < 0.4


# -- the clock -----------------------------------------------------------------------------


def test_skew_and_drift() -> None:
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


def test_bars_close_by_the_exchanges_own_clock() -> None:
    async def scene(exchange: SimulatedExchange) -> list[tuple[float, bytes]]:
        loop = asyncio.get_running_loop()
        heard = []
        async with websockets.connect(f"{exchange.ws_url}/ws/{NAMES[0]}") as socket:
            while loop.time() < 5:
                message = await socket.recv(decode=False)
                heard.append((loop.time(), message))
        return heard

    for at, message in play(Faults(skew_seconds=0.6), scene):
        event = orjson.loads(message)
        assert event["E"] == START + round(at * 1000) + 600
        if event["k"]["x"]:
            assert 0 < event["E"] - event["k"]["T"] < 50


# -- seeds ---------------------------------------------------------------------------------


def test_the_same_seed_says_the_same_and_another_another() -> None:
    faults = Faults(seed=11, **PRESETS["rough"])
    first, again = record_with_faults(faults, 90), record_with_faults(faults, 90)
    assert first.messages == again.messages
    assert first.true_bars == again.true_bars
    assert first.counts == again.counts
    assert record_with_faults(Faults(seed=12, **PRESETS["rough"]), 90).messages != first.messages


def test_switching_a_kind_off_leaves_the_others_as_they_were() -> None:
    faults = Faults(seed=4, duplicate=0.1, missing_final=0.1, lost=0.05)
    all_kinds, fewer = (
        record_with_faults(faults, 60),
        record_with_faults(faults.without("duplicate"), 60),
    )
    assert all_kinds.counts["duplicate"] > 5
    assert "duplicate" not in fewer.counts
    assert all_kinds.counts["missing_final"] == fewer.counts["missing_final"]
    assert all_kinds.true_bars == fewer.true_bars


def test_a_second_listener_changes_nothing_for_the_first() -> None:
    faults = Faults(seed=6, duplicate=0.1, revised=0.1, garbage=0.1, disorder=0.1)

    async def scene(exchange: SimulatedExchange) -> RecordedMessages:
        first, _ = await asyncio.gather(record_stream(exchange, 60), record_stream(exchange, 30))
        return first

    assert play(faults, scene).messages == record_with_faults(faults, 60).messages


def test_random_mixtures_come_from_the_seed_and_go_through_json() -> None:
    mixtures = [Faults.random(seed) for seed in range(200)]
    assert mixtures == [Faults.random(seed) for seed in range(200)]
    assert len(set(mixtures)) == 200
    assert [Faults.parse(mixture.dumps()) for mixture in mixtures] == mixtures
    plan = Faults(
        seed=1, plan=(PlannedFault("drop", 3.0), PlannedFault("late", 1.0, symbol="SIM00/USDT"))
    )
    assert Faults.parse(plan.dumps()) == plan


def test_presets_by_name_and_what_cannot_be() -> None:
    assert Faults.parse("dirty", 5) == Faults(seed=5, **PRESETS["dirty"])
    assert Faults.parse("random", 5) == Faults.random(5)
    assert Faults.parse('{"seed": 9, "drop": 3}', 5) == Faults(seed=9, drop=3)
    for text in (
        "dirt",
        "{",
        "{} {}",
        '{"dropp": 1}',
        '{"late": 2}',
        '{"drop": -1}',
        '{"late": "often"}',
        '{"late_seconds": 0}',
        '{"plan": [{"kind": "rain", "at": 1}]}',
        '{"plan": [3]}',
    ):
        with pytest.raises(FaultsError):
            Faults.parse(text)


@pytest.mark.parametrize("seed", range(6))
def test_under_a_random_mixture_rest_and_pushes_say_nothing_but_the_truth(seed: int) -> None:
    """Whatever a patient client is told of a bar, it has been so, and in the end it is so."""
    faults = Faults.random(seed)

    async def scene(exchange: SimulatedExchange) -> None:
        told: dict[tuple[str, int], list[Candle]] = defaultdict(list)
        ends = exchange.clock.now() + 120_000
        while exchange.clock.now() < ends:
            heard = await record_stream(exchange, (ends - exchange.clock.now()) / 1000)
            for name, klines in heard.klines.items():
                for kline in klines:
                    if kline.closed:
                        told[name, kline.candle.time].append(kline.candle)
            await asyncio.sleep(1)
        assert len(told) > 50
        for i, name in enumerate(NAMES):
            series = Series.parse(f"any:SIM0{i}/USDT:1s")
            for bar in exchange.truth(series, START):
                said = told.get((name, bar.candle.time), [])
                versions = exchange.versions(series, bar.candle.time)
                assert not (bar.synthetic and said)
                assert all(candle in versions for candle in said)

    play(faults, scene)
