"""Source of ccxt on real sockets, against the simulated exchange, in virtual time."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from kronos_connectors.ccxt import CONNECTOR
from kronos_stream.interfaces.source import Source, SourceError
from kronos_stream.market.clock import LoopClock
from kronos_stream.market.series import Series
from kronos_stream.testing.exchange import Faults, PlannedFault, SimulatedExchange
from tests.support.ccxt_exchange import ccxt_options, use_loop_time
from tests.support.recorded_updates import RecordedUpdates

pytestmark = pytest.mark.virtual_time

MODES = ("watch", "poll")


@pytest.fixture(autouse=True)
def _loop_time(monkeypatch: pytest.MonkeyPatch) -> None:
    use_loop_time(monkeypatch)


START = 1_750_000_000_000


@dataclass
class ConnectedExchange:
    """Exchange and a source that subscribes to all of it."""

    exchange: SimulatedExchange
    source: Source
    series: list[Series]
    recorded: RecordedUpdates

    def late(self, since: int) -> dict[Series, int]:
        """Longest time in ms without a push since ``since``, UTC ms, by series."""
        now = self.exchange.clock.now()
        longest = {}
        for one in self.series:
            moments = [u.received for u in self.recorded.updates if u.series == one]
            moments = [since, *(moment for moment in moments if moment >= since), now]
            longest[one] = max(b - a for a, b in pairwise(moments))
        return longest


@pytest.fixture(autouse=True)
async def _no_leftover_tasks() -> AsyncIterator[None]:
    """Check that a test leaves no tasks of ccxt behind."""
    yield
    await asyncio.sleep(60)  # time for them to end
    assert asyncio.all_tasks() == {asyncio.current_task()}


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
        source = CONNECTOR.build("ccxt.binance", ccxt_options(exchange, **more), clock, Random(1))
        frames = {True: "1m", False: "1s"}
        series = [Series.parse(f"ccxt.binance:{s}:{frames[':' in s]}") for s in exchange.symbols]
        recorded = RecordedUpdates()
        source.subscribe(series)
        running = asyncio.create_task(source.run(recorded.callbacks()))
        try:
            yield ConnectedExchange(exchange, source, series, recorded)
        finally:
            running.cancel()
            await asyncio.wait([running])
            await source.close()
        assert running.cancelled()


async def test_spot_and_perpetuals_are_watched_and_never_closed() -> None:
    async with connected_exchange(3, perpetuals=2) as v:
        await asyncio.sleep(150)
        assert {u.series for u in v.recorded.updates} == set(v.series)
        v.series = v.series[:3]  # perpetuals are pushed only while they trade
        assert max(v.late(START + 10_000).values()) < 3_000
        assert not any(u.closed for u in v.recorded.updates)
        assert all(u.candle.amount is None for u in v.recorded.updates)
        assert v.recorded.rejected == []
        assert v.recorded.events == {"connected": 2}  # one for each timeframe


async def test_many_series_are_subscribed_within_the_limits() -> None:
    async with connected_exchange(100) as v:
        await asyncio.sleep(90)
        assert v.recorded.events == {"connected": 2}
        assert max(v.late(START + 30_000).values()) < 5_000


async def test_poll_mode_pushes_nothing_and_does_not_connect() -> None:
    async with connected_exchange(2, mode="poll") as v:
        await asyncio.sleep(30)
        assert v.recorded == RecordedUpdates()
        now = v.exchange.clock.now()
        assert len(await v.source.history(v.series[0], now - 10_000, now)) == 10


async def test_clients_are_replaced_without_a_gap() -> None:
    async with connected_exchange(5, shard_size=2, restart_hours=0.05) as v:
        await asyncio.sleep(900)
        assert 3 * 4 <= v.recorded.events["connected"] <= 3 * 8
        assert v.recorded.events.keys() == {"connected"}
        assert max(v.late(START + 10_000).values()) < 3_000
        gc.collect()
        kind = import_module("ccxt").binance
        alive = sum(kind in type(one).__mro__ for one in gc.get_objects())
        assert alive <= 1 + 2 * 3  # replaced clients are collected


@pytest.mark.parametrize("kind", ["drop", "stall", "handshake"])
async def test_socket_fault_is_recovered_by_another_client(kind: str) -> None:
    plan = (PlannedFault(kind, 20, 15), PlannedFault("drop", 21))

    async with connected_exchange(faults=Faults(plan=plan)) as v:
        await asyncio.sleep(200)
        assert v.recorded.events["connected"] >= 2
        assert v.recorded.events["lost"] + v.recorded.events["given up"] >= 1
        assert max(v.late(START + 120_000).values()) < 3_000


async def test_silent_socket_is_replaced() -> None:
    async with connected_exchange(
        faults=Faults(plan=(PlannedFault("stall", 20),)), stall_seconds=10
    ) as v:
        await asyncio.sleep(60)
        assert v.recorded.events == {"connected": 2, "given up": 1}
        assert max(v.late(START + 45_000).values()) < 3_000


async def test_invalid_frames_lose_neither_bars_nor_the_socket() -> None:
    async with connected_exchange(faults=Faults(seed=5, garbage=0.3)) as v:
        await asyncio.sleep(120)
        assert v.exchange.fault_injector.counts["garbage"] > 100
        assert len(v.recorded.rejected) > 10
        assert all(reason and len(raw) <= 4_096 for _, reason, raw in v.recorded.rejected)
        assert v.recorded.events == {"connected": 1}
        assert max(v.late(START + 10_000).values()) < 4_000


async def test_changing_series_loses_no_bar_of_the_others() -> None:
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
        assert v.recorded.events == {"connected": 1}


@pytest.mark.parametrize("mode", MODES)
async def test_history_is_paged_and_has_no_open_bar(mode: str) -> None:
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


@pytest.mark.parametrize("skew", [-5.0, 5.0])
async def test_history_waits_for_bars_closed_by_our_clock(skew: float) -> None:
    async with connected_exchange(1, Faults(skew_seconds=skew), settle_seconds=1) as v:
        await asyncio.sleep(3)
        ours, loop = LoopClock(START).now() + 3_000, asyncio.get_running_loop()
        began, close = loop.time(), ours // 1_000 * 1_000
        bars = await v.source.history(v.series[0], close - 10_000, close)
        assert [bar.time for bar in bars] == list(range(close - 10_000, close, 1_000))
        assert bars[-1].time + 2_000 <= v.exchange.clock.now()
        assert (loop.time() - began > 5) is (skew < 0)


async def test_rate_limit_errors_carry_retry_after() -> None:
    async with connected_exchange(1, Faults(plan=(PlannedFault("limited", 5, 20),))) as v:
        await asyncio.sleep(10)
        now = v.exchange.clock.now()
        with pytest.raises(SourceError, match="429") as raised:
            await v.source.history(v.series[0], now - 5_000, now)
        assert 1 <= raised.value.retry_after <= 20
        with pytest.raises(SourceError, match="asked to wait"):
            await v.source.history(v.series[0], now - 5_000, now)
        await asyncio.sleep(20)
        assert await v.source.history(v.series[0], now - 5_000, now)
        assert v.recorded.events["rate limited"] == 1


@pytest.mark.parametrize("kind", ["error", "timeout", "mangled"])
async def test_invalid_response_raises_instead_of_empty_history(kind: str) -> None:
    faults = Faults(seed=3, plan=(PlannedFault(kind, 10, 1_000),))

    async with connected_exchange(1, faults, mode="poll") as v:
        await asyncio.sleep(5)
        now = v.exchange.clock.now()
        assert await v.source.history(v.series[0], now - 5_000, now)
        await asyncio.sleep(10)
        for _ in range(12):
            with pytest.raises(SourceError):
                await v.source.history(v.series[0], now - 5_000, now)
            await asyncio.sleep(0.1)


async def test_unsupported_series_are_explained() -> None:
    async with connected_exchange(3, perpetuals=1) as v:
        names = ("SIM1/USDT:1s", "SIM00/USDT:7m", "SIM00/USDT:USDT:1m", "SIM00/USDT:1m")
        series = [Series.parse(f"ccxt.binance:{name}") for name in names]
        why = await v.source.unsupported(series)
        assert "did you mean SIM0" in why[series[0]]
        assert "no bars of 7m, only 1s, 1m" in why[series[1]]
        assert why.keys() == set(series[:2])


async def test_source_ends_at_once_in_any_state() -> None:
    """During a hanging handshake, beside a stalled socket, and while waiting."""
    for seconds in (0, 0.01, 1.0, 12.0, 40.0):
        plan = (PlannedFault("handshake", 0, 8), PlannedFault("stall", 15, 60))
        loop = asyncio.get_running_loop()
        async with connected_exchange(3, faults=Faults(plan=plan), shard_size=1):
            await asyncio.sleep(seconds)
            began = loop.time()
        assert loop.time() - began < 6
