"""The connector on real sockets, against the simulated exchange, in virtual time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

import pytest
from aiohttp import web

from kronos_connectors.binance import CONNECTOR, BinanceOptions
from kronos_stream.interfaces.source import (
    RankingSource,
    Source,
    SourceCallbacks,
    SourceError,
    VenueRefused,
)
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.clock import LoopClock
from kronos_stream.market.series import Series
from kronos_stream.testing.exchange import Faults, PlannedFault, SimulatedExchange
from kronos_stream.testing.virtual_time import run_virtual

START = 1_750_000_000_000


@dataclass
class RecordedUpdates:
    """What a source told."""

    updates: list[Update] = field(default_factory=list)
    rejected: list[tuple[Series | None, str, bytes]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def callbacks(self) -> SourceCallbacks:
        return SourceCallbacks(
            self.updates.append,
            lambda *what: self.rejected.append(what),
            lambda note: self.notes.update([note]),
        )

    def closed(self, series: Series) -> dict[int, Candle]:
        """The venue's last words by open time."""
        return {u.candle.time: u.candle for u in self.updates if u.series == series and u.closed}


@dataclass
class ConnectedExchange:
    """An exchange and a connector that follows all of it."""

    exchange: SimulatedExchange
    source: Source
    series: list[Series]
    recorded: RecordedUpdates

    def missing(self, since: int) -> int:
        """Bars closed from ``since`` on, at least a second ago, of which no last word came."""
        until = self.exchange.clock.now() - 2_000
        return sum(
            bar.candle.time < until and self.recorded.closed(one).get(bar.candle.time) != bar.candle
            for one in self.series
            for bar in self.exchange.truth(one, since)
        )


@asynccontextmanager
async def connected_exchange(
    symbols: int = 4, faults: Faults | None = None, perpetuals: int = 0, **options: float
) -> AsyncIterator[ConnectedExchange]:
    clock = LoopClock(START)
    async with SimulatedExchange(
        symbols,
        perpetuals=perpetuals,
        faults=faults,
        clock=clock,
        timeframes=("1s", "1m"),
        history=30,
    ) as exchange:
        urls = {"ws_url": exchange.ws_url, "rest_url": exchange.rest_url}
        urls |= {
            "futures_ws_url": f"{exchange.ws_url}/market",
            "futures_rest_url": exchange.rest_url,
        }
        chosen = BinanceOptions(**urls, **options)  # type: ignore[arg-type]
        source = CONNECTOR.build("binance", chosen, clock, Random(1))
        frames = {True: "1m", False: "1s"}
        series = [Series.parse(f"binance:{s}:{frames[':' in s]}") for s in exchange.symbols]
        heard = RecordedUpdates()
        source.subscribe(series)
        running = asyncio.create_task(source.run(heard.callbacks()))
        try:
            yield ConnectedExchange(exchange, source, series, heard)
        finally:
            running.cancel()
            await asyncio.wait([running])
            await source.close()
        assert running.cancelled()


def run_in_virtual_time(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await body()

    run_virtual(main())


def test_spot_and_perpetuals_are_followed_each_on_its_own_host() -> None:
    async def body() -> None:
        async with connected_exchange(3, perpetuals=2) as v:
            await asyncio.sleep(150)
            assert v.missing(START + 60_000) == 0
            assert {u.series for u in v.recorded.updates} == set(v.series)
            assert all(u.received - u.candle.time <= 61_000 for u in v.recorded.updates)
            assert v.recorded.rejected == []
            assert v.recorded.notes["connected"] == 2

    run_in_virtual_time(body)


def test_streams_are_spread_over_sockets() -> None:
    async def body() -> None:
        async with connected_exchange(7, streams_per_connection=3) as v:
            await asyncio.sleep(20)
            assert v.recorded.notes["connected"] == 3
            assert v.missing(START + 5_000) == 0

    run_in_virtual_time(body)


def test_an_old_socket_is_relieved_without_losing_a_bar() -> None:
    async def body() -> None:
        async with connected_exchange(lifetime_seconds=60) as v:
            await asyncio.sleep(300)
            assert 5 <= v.recorded.notes["connected"] <= 8
            assert v.recorded.notes["lost"] == 0
            assert v.missing(START + 5_000) == 0

    run_in_virtual_time(body)


def test_a_server_that_says_goodbye_is_left_without_losing_a_bar() -> None:
    goodbye = Faults(plan=(PlannedFault("shutdown", 30, 10),))

    async def body() -> None:
        async with connected_exchange(faults=goodbye) as v:
            await asyncio.sleep(90)
            assert v.recorded.notes["shutdown told"] >= 1
            assert v.recorded.notes["connected"] >= 2
            assert v.missing(START + 5_000) == 0

    run_in_virtual_time(body)


@pytest.mark.parametrize("kind", ["drop", "stall", "handshake"])
def test_after_a_fault_of_the_socket_it_follows_again(kind: str) -> None:
    plan = (PlannedFault(kind, 20, 15), PlannedFault("drop", 21))

    async def body() -> None:
        async with connected_exchange(faults=Faults(plan=plan)) as v:
            await asyncio.sleep(180)
            assert v.recorded.notes["connected"] >= 2
            assert v.missing(START + 120_000) == 0

    run_in_virtual_time(body)


def test_series_change_while_it_runs_and_the_others_lose_nothing() -> None:
    async def body() -> None:
        async with connected_exchange(6) as v:
            first, last = v.series[:4], v.series[2:]
            v.source.subscribe(first)
            await asyncio.sleep(30)
            v.source.subscribe(last)
            await asyncio.sleep(30)
            now = v.exchange.clock.now()
            late = {u.series for u in v.recorded.updates if u.received > now - 20_000}
            assert late == set(last)
            v.series[:] = v.series[2:4]
            assert v.missing(START + 5_000) == 0

    run_in_virtual_time(body)


def test_symbols_are_ranked_by_what_was_traded() -> None:
    async def body() -> None:
        async with connected_exchange(6, perpetuals=3) as v:
            assert isinstance(v.source, RankingSource)
            for pattern, futures in (("*/USDT", False), ("*/USDT:USDT", True)):
                ranked = await v.source.ranked(pattern)
                assert set(ranked) == {s for s in v.exchange.symbols if (":" in s) is futures}
                traded = [
                    sum(bar.candle.amount or 0 for bar in v.exchange.truth(one, START - 86_400_000))
                    for symbol in ranked
                    for one in v.series
                    if one.symbol == symbol
                ]
                assert traded == sorted(traded, reverse=True)
                assert len(set(traded)) == len(ranked) > 1

    run_in_virtual_time(body)


def test_history_is_paged_and_never_holds_an_open_bar() -> None:
    async def body() -> None:
        async with connected_exchange(1) as v:
            (series,) = v.series
            await asyncio.sleep(0.5)
            now = v.exchange.clock.now()
            bars = await v.source.history(series, now - 1_500_000, now + 600_000)
            truth = [bar.candle for bar in v.exchange.truth(series, now - 1_500_000)]
            assert len(bars) > 1_400
            assert [bar[:6] for bar in bars] == [bar[:6] for bar in truth]
            assert bars[-1].time + 1_000 <= now
            assert await v.source.history(series, bars[5].time, bars[7].time) == bars[5:7]
            assert await v.source.history(series, now + 10_000, now + 20_000) == []

    run_in_virtual_time(body)


def test_a_skewed_clock_is_measured_before_bars_are_called_closed() -> None:
    async def body() -> None:
        async with connected_exchange(1, Faults(skew_seconds=-30)) as v:
            ours = LoopClock(START).now()
            bars = await v.source.history(v.series[0], ours - 60_000, ours + 60_000)
            assert bars[-1].time + 1_000 <= v.exchange.clock.now() < ours - 25_000

    run_in_virtual_time(body)


def test_a_thousand_histories_flow_within_the_weight_that_is_allowed() -> None:
    async def body() -> None:
        async with connected_exchange(40, weight_share=0.02) as v:
            loop = asyncio.get_running_loop()
            now, began = v.exchange.clock.now(), loop.time()
            wanted = [v.source.history(one, now - 20_000, now) for one in v.series]
            assert all(len(bars) == 20 for bars in await asyncio.gather(*wanted))
            # 40 of weight 2 at 2 a second, less what may be spent at once.
            assert 25 < loop.time() - began < 60

    run_in_virtual_time(body)


def test_when_told_to_wait_nobody_asks_until_then() -> None:
    limited = Faults(plan=(PlannedFault("limited", 5, 20),))

    async def body() -> None:
        async with connected_exchange(1, limited) as v:
            await asyncio.sleep(10)
            now = v.exchange.clock.now()
            with pytest.raises(SourceError, match="429") as told:
                await v.source.history(v.series[0], now - 5_000, now)
            assert told.value.retry_after >= 1
            with pytest.raises(SourceError, match="wait"):
                await v.source.history(v.series[0], now - 5_000, now)
            await asyncio.sleep(told.value.retry_after + 25)
            assert await v.source.history(v.series[0], now - 5_000, now)

    run_in_virtual_time(body)


def test_unknown_symbols_and_timeframes_are_explained() -> None:
    async def body() -> None:
        async with connected_exchange(3, perpetuals=1) as v:
            names = ("SIM1/USDT:1s", "SIM00/USDT:7m", "SIM00/USDT:USDT:1m")
            asked = [Series.parse(f"binance:{name}") for name in names]
            why = await v.source.unsupported(asked)
            assert "did you mean SIM0" in why[asked[0]]
            assert "no bars of 7m" in why[asked[1]]
            assert asked[2] not in why

    run_in_virtual_time(body)


@pytest.mark.parametrize("status", [403, 451])
def test_a_venue_that_refuses_us_is_not_asked_again(status: int) -> None:
    asked = 0

    async def refuse(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.Response(status=status, text="not in your country")

    async def body() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", refuse)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        source = CONNECTOR.build(
            "binance",
            BinanceOptions(rest_url=url, ws_url=url.replace("http", "ws")),
            LoopClock(START),
            Random(1),
        )
        series = Series.parse("binance:BTC/USDT:1m")
        with pytest.raises(VenueRefused, match=str(status)):
            await source.unsupported([series])
        source.subscribe([series])
        with pytest.raises(VenueRefused):
            await source.run(RecordedUpdates().callbacks())
        await source.close()
        await runner.cleanup()
        assert asked == 2

    run_in_virtual_time(body)


def test_garbage_among_the_frames_costs_neither_a_bar_nor_the_connection() -> None:
    async def body() -> None:
        async with connected_exchange(faults=Faults(seed=5, garbage=0.3)) as v:
            await asyncio.sleep(120)
            assert v.exchange.fault_injector.counts["garbage"] > 100
            assert len(v.recorded.rejected) > 50  # the rest are frames of nobody's streams
            assert all(reason and len(raw) <= 4_096 for _, reason, raw in v.recorded.rejected)
            assert v.recorded.notes["connected"] == 1
            for one in v.series:
                closed = v.recorded.closed(one)
                truth = {bar.candle.time: bar.candle for bar in v.exchange.truth(one, START)}
                assert len(closed) > 80
                assert closed.items() <= truth.items()

    run_in_virtual_time(body)


def test_hundreds_of_streams_are_asked_for_slowly_enough() -> None:
    async def body() -> None:
        async with connected_exchange(700, streams_per_connection=1_024) as v:
            await asyncio.sleep(10)
            assert v.recorded.notes["lost"] == 0
            assert v.recorded.notes["connected"] == 1
            v.series[:] = v.series[::50]
            assert v.missing(START + 5_000) == 0

    run_in_virtual_time(body)


@pytest.mark.parametrize("seed", range(3))
def test_connections_of_all_sorts_of_bad_luck_come_back(seed: int) -> None:
    faults = Faults(
        seed=seed, drop=120, stall=60, handshake=0.4, shutdown=30, lifetime_seconds=90,
        stall_seconds=40,
    )  # fmt: skip

    async def body() -> None:
        async with connected_exchange(5, faults=faults, streams_per_connection=2) as v:
            await asyncio.sleep(600)
            counts = v.exchange.fault_injector.counts
            assert min(counts[kind] for kind in ("drop", "stall", "handshake", "shutdown")) > 0
            heard = [len(v.recorded.closed(one)) for one in v.series]
            assert min(heard) > 250  # of 600; a tape asks REST for the rest
            assert v.recorded.notes["connected"] > 20

    run_in_virtual_time(body)


def test_told_to_wait_in_the_handshake_it_waits() -> None:
    arrivals: list[float] = []

    async def busy(request: web.Request) -> web.Response:
        if request.path.endswith("exchangeInfo"):
            info = {"symbol": "AB", "baseAsset": "A", "quoteAsset": "B", "status": "TRADING"}
            return web.json_response({"symbols": [info]})
        arrivals.append(asyncio.get_running_loop().time())
        return web.Response(status=429, headers={"Retry-After": "120"})

    async def body() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", busy)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        options = BinanceOptions(rest_url=url, ws_url=url.replace("http", "ws"))
        source = CONNECTOR.build("binance", options, LoopClock(START), Random(1))
        source.subscribe([Series.parse("binance:A/B:1m")])
        heard = RecordedUpdates()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(300):
                await source.run(heard.callbacks())
        await source.close()
        await runner.cleanup()
        assert [round(b - a) >= 120 for a, b in pairwise(arrivals)] == [True, True]
        assert heard.notes["rate limited"] == 3

    run_in_virtual_time(body)


def test_it_ends_at_once_whatever_it_is_doing() -> None:
    """In a handshake that hangs, beside a socket that is stalled, and while it waits."""

    async def body() -> None:
        for seconds in (0, 0.01, 1.0, 12.0, 40.0):
            plan = (PlannedFault("handshake", 0, 8), PlannedFault("stall", 15, 60))
            loop = asyncio.get_running_loop()
            async with connected_exchange(3, faults=Faults(plan=plan), streams_per_connection=1):
                await asyncio.sleep(seconds)
                began = loop.time()
            assert loop.time() - began < 5

    run_in_virtual_time(body)
