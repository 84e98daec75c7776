"""Recordings of an exchange with faults, by strict clients, in virtual time."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
import websockets

from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.clock import LoopClock
from kronos_stream.market.series import Series
from kronos_stream.testing.exchange import Faults, PlannedFault, SimulatedExchange
from kronos_stream.testing.virtual_time import run_virtual

START = 1_750_000_000_000
STREAMS = [f"sim0{i}usdt@kline_1s" for i in range(4)]


@dataclass
class RecordedKline:
    """A valid kline event. Times are ms since START."""

    at: int
    """Time of arrival."""
    event: int
    candle: Candle
    closed: bool


@dataclass
class Recording:
    """All messages that a client received, and the true bars."""

    messages: list[tuple[int, bytes]] = field(default_factory=list)
    klines: dict[str, list[RecordedKline]] = field(default_factory=lambda: defaultdict(list))
    """By stream."""
    invalid: list[bytes] = field(default_factory=list)
    true_bars: dict[str, list[Bar]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    """Numbers of injected faults."""

    def finals(self, stream: str, opened: int) -> list[RecordedKline]:
        """Closing events of the bar that opened so many ms after START."""
        return [k for k in self.klines[stream] if k.closed and k.candle.time == START + opened]


def parse_push(message: bytes) -> tuple[str, int, Candle, bool] | None:
    """Parse a message strictly: stream, event time, candle, closed; None if it is invalid."""
    try:
        wrapper = orjson.loads(message)
        event = wrapper["data"]
        kline = event["k"]
        numbers = [kline[name] for name in "ohlcvq"]
        if not all(isinstance(number, str) for number in numbers):
            return None
        candle = Candle(kline["t"], *map(float, numbers))
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None
    time = kline["t"]
    valid_time = isinstance(time, int) and 0 < time < event["E"] and time % 1000 == 0
    if wrapper["stream"] not in STREAMS or candle.invalid_reason() is not None or not valid_time:
        return None
    return wrapper["stream"], event["E"] - START, candle, kline["x"]


async def record_streams(exchange: SimulatedExchange, seconds: float) -> Recording:
    """Record all four streams from one connection for so long, or until it ends."""
    recording = Recording()
    url = f"{exchange.ws_url}/stream?streams={'/'.join(STREAMS)}"
    try:
        async with asyncio.timeout(seconds), websockets.connect(url, ping_interval=None) as ws:
            async for text in ws:
                message = text.encode() if isinstance(text, str) else text
                at = exchange.clock.now() - START
                recording.messages.append((at, message))
                parsed = parse_push(message)
                if parsed is None:
                    recording.invalid.append(message)
                else:
                    recording.klines[parsed[0]].append(RecordedKline(at, *parsed[1:]))
    except (OSError, EOFError, websockets.WebSocketException):  # TimeoutError is an OSError
        pass
    for i, name in enumerate(STREAMS):
        series = Series.parse(f"any:SIM0{i}/USDT:1s")
        recording.true_bars[name] = exchange.truth(series, START)
    recording.counts = dict(exchange.fault_injector.counts)
    return recording


def run_exchange(
    faults: Faults, scene: Callable[[SimulatedExchange], Awaitable[Any]], **options: Any
) -> Any:
    """Run ``scene`` against a new exchange, on a new event loop."""

    async def main() -> Any:
        exchange = SimulatedExchange(
            **{"symbols": 4, "history": 20, "seed": 2, "faults": faults, **options},
            clock=LoopClock(START),
        )
        async with exchange:
            return await scene(exchange)

    return run_virtual(main())


def record_with_faults(faults: Faults, seconds: float = 30) -> Recording:
    """Record all streams of a new exchange."""
    recording: Recording = run_exchange(faults, lambda exchange: record_streams(exchange, seconds))
    return recording


def planned(kind: str, at: float, seconds: float = 0, symbol: str = "", **more: Any) -> Faults:
    """One fault at a fixed time, in seconds after the start."""
    return Faults(plan=(PlannedFault(kind, at, seconds, symbol),), **more)


async def rest_opens(exchange: SimulatedExchange, symbol: str = "SIM00USDT") -> list[int]:
    """Open times of the bars that REST returns, ms since START."""
    url = f"{exchange.rest_url}/api/v3/klines?symbol={symbol}&interval=1s&startTime={START}"
    async with aiohttp.ClientSession() as http, http.get(url) as response:
        return [row[0] - START for row in await response.json()]
