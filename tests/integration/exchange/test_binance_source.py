"""Source of Binance on real sockets, against the simulated exchange, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random

import pytest

from kronos_connectors.binance import CONNECTOR, BinanceOptions
from kronos_stream.interfaces.source import (
    RankingSource,
    Source,
    SourceError,
)
from kronos_stream.market.clock import LoopClock
from kronos_stream.market.series import Series
from kronos_stream.testing.exchange import Faults, PlannedFault, SimulatedExchange
from tests.support.recorded_updates import RecordedUpdates

START = 1_750_000_000_000


@dataclass
class ConnectedExchange:
    """Exchange and a connector that subscribes to all of it."""

    exchange: SimulatedExchange
    source: Source
    series: list[Series]
    recorded: RecordedUpdates

    def missing(self, since: int) -> int:
        """Bars closed from ``since`` on, at least a second ago, that were not received closed."""
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


@pytest.mark.virtual_time
async def test_spot_and_perpetuals_are_pushed_by_their_own_hosts() -> None:
    async with connected_exchange(3, perpetuals=2) as v:
        await asyncio.sleep(150)
        assert v.missing(START + 60_000) == 0
        assert {u.series for u in v.recorded.updates} == set(v.series)
        assert all(u.received - u.candle.time <= 61_000 for u in v.recorded.updates)
        assert v.recorded.rejected == []
        assert v.recorded.events["connected"] == 2


@pytest.mark.virtual_time
async def test_streams_are_spread_over_sockets() -> None:
    async with connected_exchange(7, streams_per_connection=3) as v:
        await asyncio.sleep(20)
        assert v.recorded.events["connected"] == 3
        assert v.missing(START + 5_000) == 0


@pytest.mark.virtual_time
async def test_expired_socket_is_replaced_without_losing_a_bar() -> None:
    async with connected_exchange(lifetime_seconds=60) as v:
        await asyncio.sleep(300)
        assert 5 <= v.recorded.events["connected"] <= 8
        assert v.recorded.events["lost"] == 0
        assert v.missing(START + 5_000) == 0


@pytest.mark.virtual_time
async def test_shutdown_announcement_loses_no_bar() -> None:
    goodbye = Faults(plan=(PlannedFault("shutdown", 30, 10),))

    async with connected_exchange(faults=goodbye) as v:
        await asyncio.sleep(90)
        assert v.recorded.events["shutdown told"] >= 1
        assert v.recorded.events["connected"] >= 2
        assert v.missing(START + 5_000) == 0


@pytest.mark.virtual_time
@pytest.mark.parametrize("kind", ["drop", "stall", "handshake"])
async def test_socket_fault_is_recovered(kind: str) -> None:
    plan = (PlannedFault(kind, 20, 15), PlannedFault("drop", 21))

    async with connected_exchange(faults=Faults(plan=plan)) as v:
        await asyncio.sleep(180)
        assert v.recorded.events["connected"] >= 2
        assert v.missing(START + 120_000) == 0


@pytest.mark.virtual_time
async def test_changing_series_loses_no_bar_of_the_others() -> None:
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


@pytest.mark.virtual_time
async def test_symbols_are_ranked_by_turnover() -> None:
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


@pytest.mark.virtual_time
async def test_history_is_paged_and_has_no_open_bar() -> None:
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


@pytest.mark.virtual_time
async def test_history_allows_for_a_skewed_clock() -> None:
    async with connected_exchange(1, Faults(skew_seconds=-30)) as v:
        ours = LoopClock(START).now()
        bars = await v.source.history(v.series[0], ours - 60_000, ours + 60_000)
        assert bars[-1].time + 1_000 <= v.exchange.clock.now() < ours - 25_000


@pytest.mark.virtual_time
async def test_histories_stay_within_the_request_weight() -> None:
    async with connected_exchange(40, weight_share=0.02) as v:
        loop = asyncio.get_running_loop()
        now, began = v.exchange.clock.now(), loop.time()
        wanted = [v.source.history(one, now - 20_000, now) for one in v.series]
        assert all(len(bars) == 20 for bars in await asyncio.gather(*wanted))
        # 40 requests of weight 2 at 2 a second, less the initial burst.
        assert 25 < loop.time() - began < 60


@pytest.mark.virtual_time
async def test_rate_limit_pauses_history() -> None:
    limited = Faults(plan=(PlannedFault("limited", 5, 20),))

    async with connected_exchange(1, limited) as v:
        await asyncio.sleep(10)
        now = v.exchange.clock.now()
        with pytest.raises(SourceError, match="429") as raised:
            await v.source.history(v.series[0], now - 5_000, now)
        assert raised.value.retry_after >= 1
        with pytest.raises(SourceError, match="wait"):
            await v.source.history(v.series[0], now - 5_000, now)
        await asyncio.sleep(raised.value.retry_after + 25)
        assert await v.source.history(v.series[0], now - 5_000, now)


@pytest.mark.virtual_time
async def test_unsupported_series_are_explained() -> None:
    async with connected_exchange(3, perpetuals=1) as v:
        names = ("SIM1/USDT:1s", "SIM00/USDT:7m", "SIM00/USDT:USDT:1m")
        series = [Series.parse(f"binance:{name}") for name in names]
        why = await v.source.unsupported(series)
        assert "did you mean SIM0" in why[series[0]]
        assert "no bars of 7m" in why[series[1]]
        assert series[2] not in why


@pytest.mark.virtual_time
async def test_invalid_frames_lose_neither_bars_nor_the_connection() -> None:
    async with connected_exchange(faults=Faults(seed=5, garbage=0.3)) as v:
        await asyncio.sleep(120)
        assert v.exchange.fault_injector.counts["garbage"] > 100
        assert len(v.recorded.rejected) > 50  # the rest are frames of other streams
        assert all(reason and len(raw) <= 4_096 for _, reason, raw in v.recorded.rejected)
        assert v.recorded.events["connected"] == 1
        for one in v.series:
            closed = v.recorded.closed(one)
            truth = {bar.candle.time: bar.candle for bar in v.exchange.truth(one, START)}
            assert len(closed) > 80
            assert closed.items() <= truth.items()


@pytest.mark.virtual_time
async def test_hundreds_of_streams_are_subscribed_within_the_limits() -> None:
    async with connected_exchange(700, streams_per_connection=1_024) as v:
        await asyncio.sleep(10)
        assert v.recorded.events["lost"] == 0
        assert v.recorded.events["connected"] == 1
        v.series[:] = v.series[::50]
        assert v.missing(START + 5_000) == 0


@pytest.mark.virtual_time
@pytest.mark.parametrize("seed", range(3))
async def test_connections_recover_from_random_faults(seed: int) -> None:
    faults = Faults(
        seed=seed, drop=120, stall=60, handshake=0.4, shutdown=30, lifetime_seconds=90,
        stall_seconds=40,
    )  # fmt: skip

    async with connected_exchange(5, faults=faults, streams_per_connection=2) as v:
        await asyncio.sleep(600)
        counts = v.exchange.fault_injector.counts
        assert min(counts[kind] for kind in ("drop", "stall", "handshake", "shutdown")) > 0
        closed = [len(v.recorded.closed(one)) for one in v.series]
        assert min(closed) > 250  # of 600; a sequencer requests the rest by REST
        assert v.recorded.events["connected"] > 20


@pytest.mark.virtual_time
async def test_source_ends_at_once_in_any_state() -> None:
    """During a hanging handshake, beside a stalled socket, and while waiting."""
    for seconds in (0, 0.01, 1.0, 12.0, 40.0):
        plan = (PlannedFault("handshake", 0, 8), PlannedFault("stall", 15, 60))
        loop = asyncio.get_running_loop()
        async with connected_exchange(3, faults=Faults(plan=plan), streams_per_connection=1):
            await asyncio.sleep(seconds)
            began = loop.time()
        assert loop.time() - began < 5
