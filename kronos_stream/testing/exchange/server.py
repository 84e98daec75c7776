"""The exchange as one server on one port."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from aiohttp import web

from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.clock import Clock, SystemClock
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.testing.exchange.bars import Bars
from kronos_stream.testing.exchange.instruments import Feed, FileFeed, GeneratedFeed
from kronos_stream.testing.exchange.pushes import Pushes
from kronos_stream.testing.exchange.rest import FUTURES, SPOT, Rest
from kronos_stream.testing.exchange.sockets import Connection, Streams

_MOST_HISTORY = 2_000_000


class SimulatedExchange:
    """Binance's public market data, spot and USD-M, over a generated market or candle files.

    Use it as ``async with SimulatedExchange(symbols=20) as exchange:``; a client then needs
    :attr:`rest_url` and :attr:`ws_url`, the same for spot and futures. A websocket under
    ``/market`` or ``/futures`` is a futures one, and so is any where only perpetuals are listed.

    symbols, perpetuals: how many spot markets SIM00/USDT, … and perpetuals SIM00/USDT:USDT, …
    timeframes: the intervals offered; the shortest is drawn, the others are made of it.
    candles: files to be replayed instead, see :class:`FileFeed`.
    history: bars of the longest timeframe that there are at the start.
    keep: bars per timeframe that are remembered, ``max(2 * history, 2000)`` if None.
    """

    def __init__(
        self,
        symbols: int = 20,
        *,
        perpetuals: int = 0,
        timeframes: Sequence[str] = ("1s",),
        candles: Sequence[Path] = (),
        seed: int = 0,
        history: int = 600,
        keep: int | None = None,
        clock: Clock | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self._timeframes = sorted(
            {Timeframe.parse(text) for text in timeframes}, key=lambda t: t.after(0)
        )
        shortest = self._timeframes[0].milliseconds
        if candles:
            self._feed: Feed = FileFeed(candles)
        elif shortest is None:
            raise ValueError("an exchange of months alone has nothing to draw")
        else:
            self._feed = GeneratedFeed(symbols, perpetuals, shortest, seed)
        for timeframe in self._timeframes:
            _check(timeframe, self._feed.timeframe_ms, history)
        self._seed, self._history = seed, history
        self._keep = max(2 * history, 2_000) if keep is None else keep
        self.clock: Clock = SystemClock() if clock is None else clock
        self._host, self._port = host, port
        self._stop = asyncio.Event()

    @property
    def symbols(self) -> list[str]:
        """What is listed, in ccxt's notation."""
        return [instrument.symbol for instrument in self._feed.instruments]

    @property
    def rest_url(self) -> str:
        return f"http://{self._host}:{self._port}"

    @property
    def ws_url(self) -> str:
        return f"ws://{self._host}:{self._port}"

    async def __aenter__(self) -> Self:
        closed: list[Pushes] = []
        self._bars = Bars(
            self._feed,
            self._timeframes,
            self.clock.now(),
            history=self._history,
            keep=self._keep,
            closed=lambda book, opened: closed[0].closed(book, opened),
        )
        self._streams = Streams(self._bars)
        self._pushes = Pushes(self._bars, self._streams, self.clock, self._seed)
        closed.append(self._pushes)
        app = web.Application()
        for rules in (SPOT, FUTURES):
            app.add_routes(Rest(rules, self._bars, self.clock).routes())
        for prefix in ("", "/market", "/futures", "/futures/market"):
            app.router.add_get(f"{prefix}/ws", self._connect)
            app.router.add_get(f"{prefix}/ws/{{names:.*}}", self._connect)
            app.router.add_get(f"{prefix}/stream", self._connect)
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        self._port = self._runner.addresses[0][1]
        self._pushing = asyncio.create_task(self._pushes.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._pushing.cancel()
        await asyncio.wait([self._pushing])
        for connection in list(self._streams.connections):
            connection.abort()
        await self._runner.cleanup()
        if not self._pushing.cancelled():
            self._pushing.result()  # what went wrong must be seen

    async def _connect(self, request: web.Request) -> web.StreamResponse:
        futures = request.path.startswith(("/market", "/futures")) or not any(
            not instrument.perpetual for instrument in self._feed.instruments
        )
        combined = request.path.endswith("/stream")
        text = request.query.get("streams", "") if combined else request.match_info.get("names", "")
        names = [name for name in text.split("/") if name]
        socket = web.WebSocketResponse(autoping=False, compress=False, timeout=2.0)
        await socket.prepare(request)
        transport = request.transport
        if not isinstance(transport, asyncio.Transport):
            return socket
        connection = Connection(
            socket, transport, self._streams, futures=futures, combined=combined
        )
        await connection.serve(names)
        return socket

    def truth(self, series: Series, since: int = 0) -> list[Bar]:
        """The closed bars of ``series``, of any venue's name, that opened at ``since`` or later."""
        self._bars.advance(self.clock.now())
        index = self.symbols.index(series.symbol)
        opens, bars = self._bars.books[str(series.timeframe)].between(since, 2**62)
        return [
            Bar(Candle(opened, *bar[:6]))
            for opened, bar in zip(opens, bars[:, index].tolist(), strict=True)
        ]


def _check(timeframe: Timeframe, base_ms: int, history: int) -> None:
    length = timeframe.milliseconds
    if (length or 86_400_000) % base_ms:
        raise ValueError(f"bars of {timeframe} cannot be made of bars of {base_ms / 1000:g} s")
    if history * (length or 31 * 86_400_000) // base_ms > _MOST_HISTORY:
        raise ValueError(
            f"{history} bars of {timeframe} history are too many bars of {base_ms / 1000:g} s; "
            "ask for less history or leave out the shortest timeframe"
        )
