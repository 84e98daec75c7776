"""The real ccxt on real sockets, its Binance client led to the simulated exchange, in virtual time.

A seed is a trial (:mod:`tests.support.chaos`) in one of the two modes; one that fails is
played again by

    KRONOS_SEEDS=123 make test ARGS="tests/integration/exchange/test_ccxt_source.py -k test_seed"
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest

from kronos_connectors.ccxt import CONNECTOR, CcxtOptions
from kronos_stream.interfaces.source import Source, SourceCallbacks, SourceError
from kronos_stream.market.candle import Update
from kronos_stream.market.clock import LoopClock
from kronos_stream.market.series import Series
from kronos_stream.testing.exchange import Faults, PlannedFault, SimulatedExchange
from kronos_stream.testing.virtual_time import run_virtual
from tests.support.chaos import ConnectorSetup
from tests.support.chaos_checks import check_seed
from tests.support.chaos_scenario import selected_seeds

START = 1_750_000_000_000
MODES = ("watch", "poll")


@pytest.fixture(autouse=True)
def _ccxt_in_virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ccxt's limiter and pings live by the loop's time, too, and not by the machine's."""

    def now() -> float:
        try:
            return asyncio.get_running_loop().time()
        except RuntimeError:
            return time.time()

    monkeypatch.setattr(import_module("ccxt.async_support.base.throttler"), "time", now)
    exchange = import_module("ccxt.base.exchange").BaseExchange
    monkeypatch.setattr(exchange, "milliseconds", staticmethod(lambda: round(now() * 1000)))


def options(exchange: SimulatedExchange, **more: Any) -> CcxtOptions:
    """What leads ccxt's Binance client to ``exchange``."""
    urls = {
        "public": f"{exchange.rest_url}/api/v3",
        "fapiPublic": f"{exchange.rest_url}/fapi/v1",
        # ccxt takes for spot what has /stream in its URL, as stream.binance.com has.
        "ws": {"spot": f"{exchange.ws_url}/ws/stream", "linear": f"{exchange.ws_url}/ws"},
    }
    markets = {"fetchMarkets": {"types": ["spot", "linear"]}}
    config = {"binance": {"urls": {"api": urls}, "options": markets}}
    return CcxtOptions.model_validate({"config": orjson.dumps(config).decode(), **more})


# -- fault seeds ---------------------------------------------------------------------------


def check(seed: int, mode: str, folder: Path) -> None:
    """Run a seed; with odd ones clients are replaced every minute or so, else every few hours."""
    hours = 0.02 if seed % 2 else 6.0
    connect = partial(options, mode=mode, restart_hours=hours)
    check_seed(seed, folder, ConnectorSetup("ccxt.binance", connect, has_amounts=False))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", selected_seeds(range(3)))
def test_seed(seed: int, mode: str, tmp_path: Path) -> None:
    check(seed, mode, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", selected_seeds(range(2_000, 2_050)))
def test_soak_seed(seed: int, mode: str, tmp_path: Path) -> None:
    check(seed, mode, tmp_path)


# -- the source by itself ------------------------------------------------------------------


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


@dataclass
class ConnectedExchange:
    """An exchange and a source that follows all of it."""

    exchange: SimulatedExchange
    source: Source
    series: list[Series]
    recorded: RecordedUpdates

    def late(self, since: int) -> dict[Series, int]:
        """The longest time, ms, without a push of each series since then, UTC ms."""
        now = self.exchange.clock.now()
        longest = {}
        for one in self.series:
            moments = [u.received for u in self.recorded.updates if u.series == one]
            moments = [since, *(moment for moment in moments if moment >= since), now]
            longest[one] = max(b - a for a, b in pairwise(moments))
        return longest


@asynccontextmanager
async def connected_exchange(
    symbols: int = 4, faults: Faults | None = None, perpetuals: int = 0, **more: Any
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
        source = CONNECTOR.build("ccxt.binance", options(exchange, **more), clock, Random(1))
        frames = {True: "1m", False: "1s"}
        series = [Series.parse(f"ccxt.binance:{s}:{frames[':' in s]}") for s in exchange.symbols]
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
        await asyncio.sleep(60)  # whatever ccxt has left behind has had its time
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left

    run_virtual(main())


def test_spot_and_perpetuals_are_watched_and_never_called_closed() -> None:
    async def body() -> None:
        async with connected_exchange(3, perpetuals=2) as v:
            await asyncio.sleep(150)
            assert {u.series for u in v.recorded.updates} == set(v.series)
            v.series = v.series[:3]  # perpetuals are pushed only while they trade
            assert max(v.late(START + 10_000).values()) < 3_000
            assert not any(u.closed for u in v.recorded.updates)
            assert all(u.candle.amount is None for u in v.recorded.updates)
            assert v.recorded.rejected == []
            assert v.recorded.notes == {"connected": 2}  # one for each timeframe

    run_in_virtual_time(body)


def test_many_series_are_subscribed_to_slowly_enough() -> None:
    async def body() -> None:
        async with connected_exchange(100) as v:
            await asyncio.sleep(90)
            assert v.recorded.notes == {"connected": 2}
            assert max(v.late(START + 30_000).values()) < 5_000

    run_in_virtual_time(body)


def test_where_candles_are_polled_nothing_is_pushed_and_nothing_connected() -> None:
    async def body() -> None:
        async with connected_exchange(2, mode="poll") as v:
            await asyncio.sleep(30)
            assert v.recorded == RecordedUpdates()
            now = v.exchange.clock.now()
            assert len(await v.source.history(v.series[0], now - 10_000, now)) == 10

    run_in_virtual_time(body)


def test_clients_are_replaced_while_all_goes_on() -> None:
    async def body() -> None:
        async with connected_exchange(5, shard_size=2, restart_hours=0.05) as v:
            await asyncio.sleep(900)
            assert 3 * 4 <= v.recorded.notes["connected"] <= 3 * 8
            assert v.recorded.notes.keys() == {"connected"}
            assert max(v.late(START + 10_000).values()) < 3_000
            gc.collect()
            kind = import_module("ccxt").binance
            alive = sum(kind in type(one).__mro__ for one in gc.get_objects())
            assert alive <= 1 + 2 * 3  # nothing keeps those that were replaced

    run_in_virtual_time(body)


@pytest.mark.parametrize("kind", ["drop", "stall", "handshake"])
def test_after_a_fault_of_the_socket_another_client_goes_on(kind: str) -> None:
    plan = (PlannedFault(kind, 20, 15), PlannedFault("drop", 21))

    async def body() -> None:
        async with connected_exchange(faults=Faults(plan=plan)) as v:
            await asyncio.sleep(200)
            assert v.recorded.notes["connected"] >= 2
            assert v.recorded.notes["lost"] + v.recorded.notes["given up"] >= 1
            assert max(v.late(START + 120_000).values()) < 3_000

    run_in_virtual_time(body)


def test_a_socket_that_is_silent_but_open_is_noticed() -> None:
    async def body() -> None:
        async with connected_exchange(
            faults=Faults(plan=(PlannedFault("stall", 20),)), stall_seconds=10
        ) as v:
            await asyncio.sleep(60)
            assert v.recorded.notes == {"connected": 2, "given up": 1}
            assert max(v.late(START + 45_000).values()) < 3_000

    run_in_virtual_time(body)


def test_frames_that_ccxt_cannot_read_cost_neither_the_socket_nor_a_bar() -> None:
    async def body() -> None:
        async with connected_exchange(faults=Faults(seed=5, garbage=0.3)) as v:
            await asyncio.sleep(120)
            assert v.exchange.fault_injector.counts["garbage"] > 100
            assert len(v.recorded.rejected) > 10
            assert all(reason and len(raw) <= 4_096 for _, reason, raw in v.recorded.rejected)
            assert v.recorded.notes == {"connected": 1}
            assert max(v.late(START + 10_000).values()) < 4_000

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
            assert {u.series for u in v.recorded.updates if u.received > now - 15_000} == set(last)
            v.series[:] = v.series[2:4]
            assert max(v.late(START + 10_000).values()) < 3_000
            assert v.recorded.notes == {"connected": 1}

    run_in_virtual_time(body)


@pytest.mark.parametrize("mode", MODES)
def test_history_is_paged_and_never_holds_an_open_bar(mode: str) -> None:
    async def body() -> None:
        async with connected_exchange(1, mode=mode) as v:
            (series,) = v.series
            await asyncio.sleep(0.5)
            now = v.exchange.clock.now()
            bars = await v.source.history(series, now - 1_500_000, now + 600_000)
            truth = [bar.candle for bar in v.exchange.truth(series, now - 1_500_000)]
            assert len(bars) > 1_400
            assert [bar[:6] for bar in bars] == [bar[:6] for bar in truth[: len(bars)]]
            assert now - 1_000 < bars[-1].time + 1_000 <= now
            assert all(bar.amount is None for bar in bars)
            assert await v.source.history(series, bars[5].time, bars[7].time) == bars[5:7]
            assert await v.source.history(series, now + 60_000, now + 70_000) == []

    run_in_virtual_time(body)


@pytest.mark.parametrize("skew", [-5.0, 5.0])
def test_what_has_closed_by_our_clock_is_waited_for_by_the_exchanges(skew: float) -> None:
    async def body() -> None:
        async with connected_exchange(1, Faults(skew_seconds=skew), settle_seconds=1) as v:
            await asyncio.sleep(3)
            ours, loop = LoopClock(START).now() + 3_000, asyncio.get_running_loop()
            began, close = loop.time(), ours // 1_000 * 1_000
            bars = await v.source.history(v.series[0], close - 10_000, close)
            assert [bar.time for bar in bars] == list(range(close - 10_000, close, 1_000))
            assert bars[-1].time + 2_000 <= v.exchange.clock.now()
            assert (loop.time() - began > 5) is (skew < 0)

    run_in_virtual_time(body)


def test_told_to_wait_the_tape_is_told_how_long() -> None:
    async def body() -> None:
        async with connected_exchange(1, Faults(plan=(PlannedFault("limited", 5, 20),))) as v:
            await asyncio.sleep(10)
            now = v.exchange.clock.now()
            with pytest.raises(SourceError, match="429") as refused:
                await v.source.history(v.series[0], now - 5_000, now)
            assert 1 <= refused.value.retry_after <= 20
            with pytest.raises(SourceError, match="asked to wait"):
                await v.source.history(v.series[0], now - 5_000, now)
            await asyncio.sleep(20)
            assert await v.source.history(v.series[0], now - 5_000, now)
            assert v.recorded.notes["rate limited"] == 1

    run_in_virtual_time(body)


@pytest.mark.parametrize("kind", ["error", "timeout", "mangled"])
def test_a_bad_answer_is_an_error_and_never_an_empty_history(kind: str) -> None:
    faults = Faults(seed=3, plan=(PlannedFault(kind, 10, 1_000),))

    async def body() -> None:
        async with connected_exchange(1, faults, mode="poll") as v:
            await asyncio.sleep(5)
            now = v.exchange.clock.now()
            assert await v.source.history(v.series[0], now - 5_000, now)
            await asyncio.sleep(10)
            for _ in range(12):
                with pytest.raises(SourceError):
                    await v.source.history(v.series[0], now - 5_000, now)
                await asyncio.sleep(0.1)

    run_in_virtual_time(body)


def test_unknown_symbols_and_timeframes_are_explained() -> None:
    async def body() -> None:
        async with connected_exchange(3, perpetuals=1) as v:
            names = ("SIM1/USDT:1s", "SIM00/USDT:7m", "SIM00/USDT:USDT:1m", "SIM00/USDT:1m")
            asked = [Series.parse(f"ccxt.binance:{name}") for name in names]
            why = await v.source.unsupported(asked)
            assert "did you mean SIM0" in why[asked[0]]
            assert "no bars of 7m, only 1s, 1m" in why[asked[1]]
            assert why.keys() == set(asked[:2])

    run_in_virtual_time(body)


def test_it_ends_at_once_whatever_it_is_doing() -> None:
    """In a handshake that hangs, beside a socket that is stalled, and while it waits."""

    async def body() -> None:
        for seconds in (0, 0.01, 1.0, 12.0, 40.0):
            plan = (PlannedFault("handshake", 0, 8), PlannedFault("stall", 15, 60))
            loop = asyncio.get_running_loop()
            async with connected_exchange(3, faults=Faults(plan=plan), shard_size=1):
                await asyncio.sleep(seconds)
                began = loop.time()
            assert loop.time() - began < 6

    run_in_virtual_time(body)
