"""The simulated exchange as one server on one port."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import structlog
from aiohttp import web

from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.clock import Clock, SystemClock
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.testing.exchange.bar_faults import BarFaults
from kronos_stream.testing.exchange.bar_simulator import END_OF_TIME, BarHistory, BarSimulator
from kronos_stream.testing.exchange.fault_injector import FaultInjector, SkewedClock
from kronos_stream.testing.exchange.faults import Faults
from kronos_stream.testing.exchange.instruments import BarFeed, FileFeed, GeneratedFeed
from kronos_stream.testing.exchange.push_scheduler import PushScheduler
from kronos_stream.testing.exchange.rest_api import FUTURES, SPOT, RestApi
from kronos_stream.testing.exchange.ws_server import WebSocketServer
from kronos_stream.testing.exchange.ws_streams import Streams
from kronos_stream.testing.seasonality import WEEK_MS

_log = structlog.get_logger()

_MAX_URL_BYTES = 1 << 16  # a thousand streams
_MAX_HISTORY = 2_000_000
_MIN_KEPT = 100  # faults affect recently closed bars


class ExchangeError(ValueError):
    """Invalid options of an exchange; the message names the cause."""


class SimulatedExchange:
    """Binance's public market data, spot and USD-M, over a generated market or candle files.

    Use it as ``async with SimulatedExchange(symbols=20) as exchange:``; a client then needs
    :attr:`rest_url` and :attr:`ws_url`, the same for spot and futures. WebSockets under
    ``/market`` or ``/futures`` carry futures; so do all if only perpetuals are listed.

    symbols, perpetuals: numbers of spot markets SIM00/USDT, … and perpetuals SIM00/USDT:USDT, …
    timeframes: those offered, Binance's or any other such as 10s; that of the files if empty. The
    shortest is generated, and the others are made of it.
    candles: files to replay instead, see :class:`FileFeed`.
    history: bars of the longest timeframe at the start; a hundred thousand bars of the shortest
    take half a minute.
    keep: number of bars kept per timeframe, ``max(2 * history, 2000)`` if None.
    clock: time of the market; with faults the exchange's :attr:`clock` may differ from it. Pings
    and the limit of messages per second use the time of the event loop.
    """

    def __init__(
        self,
        symbols: int = 20,
        *,
        perpetuals: int = 0,
        timeframes: Sequence[str] = (),
        candles: Sequence[Path] = (),
        seed: int = 0,
        faults: Faults | None = None,
        history: int = 600,
        keep: int | None = None,
        clock: Clock | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        offered = [Timeframe.parse(text) for text in timeframes]
        if candles:
            self._feed: BarFeed = FileFeed(candles)
            offered = offered or [Timeframe.from_step(self._feed.timeframe_ms)]
        else:
            offered = offered or [Timeframe(1, "s")]
            shortest = min(t.milliseconds or END_OF_TIME for t in offered)
            if shortest > WEEK_MS:
                raise ExchangeError("the shortest timeframe must be at most a week")
            self._feed = GeneratedFeed(symbols, perpetuals, shortest, seed)
        for timeframe in offered:
            _check(timeframe, self._feed.timeframe_ms, history)
        self._timeframes = sorted(set(offered), key=lambda t: t.after(0))
        self.faults = faults or Faults(seed=seed)
        self._history = history
        self._keep = max(2 * history, 2_000) if keep is None else max(keep, _MIN_KEPT)
        self._clock: Clock = SystemClock() if clock is None else clock
        self._host, self._port = host, port

    @property
    def symbols(self) -> list[str]:
        """Listed symbols, in ccxt's notation."""
        return [instrument.symbol for instrument in self._feed.instruments]

    @property
    def timeframes(self) -> list[str]:
        """Timeframes offered, shortest first."""
        return [str(timeframe) for timeframe in self._timeframes]

    @property
    def rest_url(self) -> str:
        return f"http://{self._host}:{self._port}"

    @property
    def ws_url(self) -> str:
        return f"ws://{self._host}:{self._port}"

    async def __aenter__(self) -> Self:
        faults = self.faults
        self.clock: Clock = self._clock
        if faults.skew_seconds or faults.drift_ppm:
            self.clock = SkewedClock(self.clock, faults.skew_seconds, faults.drift_ppm)
        now = self.clock.now()
        self.fault_injector = FaultInjector(faults, now)
        """Faults that happened: its ``counts`` by kind, and its ``incidents``."""
        self._bars = BarSimulator(
            self._feed, self._timeframes, now, history=self._history, keep=self._keep
        )
        self._bar_faults = BarFaults(self._bars, self.fault_injector)
        streams = self._streams = Streams(self._bars)
        pushes = PushScheduler(
            self._bars, self._bar_faults, streams, self.clock, self.fault_injector
        )
        self._ws_server = WebSocketServer(
            streams, self.clock, self.fault_injector, spot=self._has_spot()
        )
        app = web.Application()
        for rules in (SPOT, FUTURES):
            app.add_routes(
                RestApi(
                    rules, self._bars, self._bar_faults, self.clock, self.fault_injector
                ).routes()
            )
        app.add_routes(self._ws_server.routes())
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=1.0,
            max_line_size=_MAX_URL_BYTES,
        )
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError:  # the port is in use
            await self._runner.cleanup()
            raise
        self._port = self._runner.addresses[0][1]
        self._push_task = asyncio.create_task(pushes.run(), name="pushes")
        self._tasks = [
            self._push_task,
            asyncio.create_task(self._ws_server.run(), name="websockets"),
        ]
        for task in self._tasks:
            task.add_done_callback(_report)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        self._ws_server.abort()
        await self._runner.cleanup()
        for task in self._tasks:
            if not task.cancelled():
                task.result()  # raises its error

    async def run(self, stop: asyncio.Event) -> None:
        """Wait until ``stop`` is set or the exchange fails; closing it then raises the error."""
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([stopping, self._push_task], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()

    def _has_spot(self) -> bool:
        return not all(instrument.perpetual for instrument in self._feed.instruments)

    # -- true bars ---------------------------------------------------------------------------

    def truth(self, series: Series, since: int = 0) -> list[Bar]:
        """Closed bars of ``series``, with any venue name, that opened at ``since`` or later.

        Changed bars have their last version, and the number of changes as their revision; bars
        that the venue does not have are synthetic.
        """
        self._bars.advance(self.clock.now())
        history, index = self._find(series)
        return self._bar_faults.truth(history, index, since)

    def versions(self, series: Series, opened: int) -> list[Candle]:
        """All versions of a bar; clients that were disconnected may have an old one."""
        history, index = self._find(series)
        now = Candle(opened, *history.bars(opened)[index, :6].tolist())
        return [*self._bar_faults.versions(history, opened, index), now]

    def _find(self, series: Series) -> tuple[BarHistory, int]:
        return self._bars.histories[str(series.timeframe)], self.symbols.index(series.symbol)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        _log.error("the exchange has stopped", task=task.get_name(), exc_info=task.exception())


def _check(timeframe: Timeframe, base_ms: int, history: int) -> None:
    length = timeframe.milliseconds
    if (length or 86_400_000) % base_ms:
        raise ExchangeError(f"bars of {timeframe} cannot be made of bars of {base_ms / 1000:g} s")
    if history * (length or 31 * 86_400_000) // base_ms > _MAX_HISTORY:
        raise ExchangeError(
            f"{history} bars of {timeframe} history are too many bars of {base_ms / 1000:g} s; "
            "ask for less history or leave out the shortest timeframe"
        )
