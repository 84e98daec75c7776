"""Faults depend on the seed alone; presets and the JSON form of faults."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import pytest

from kronos_stream.market.candle import Candle
from kronos_stream.market.series import Series
from kronos_stream.testing.exchange import (
    PRESETS,
    Faults,
    FaultsError,
    PlannedFault,
    SimulatedExchange,
)
from tests.support.exchange_recording import (
    START,
    STREAMS,
    Recording,
    record_streams,
    record_with_faults,
    run_exchange,
)


def test_same_seed_gives_the_same_messages() -> None:
    faults = Faults(seed=11, **PRESETS["rough"])
    first, again = record_with_faults(faults, 90), record_with_faults(faults, 90)
    assert first.messages == again.messages
    assert first.true_bars == again.true_bars
    assert first.counts == again.counts
    assert record_with_faults(Faults(seed=12, **PRESETS["rough"]), 90).messages != first.messages


def test_faults_of_one_kind_do_not_change_the_others() -> None:
    faults = Faults(seed=4, duplicate=0.1, missing_final=0.1, lost=0.05)
    all_kinds, fewer = (
        record_with_faults(faults, 60),
        record_with_faults(faults.without("duplicate"), 60),
    )
    assert all_kinds.counts["duplicate"] > 5
    assert "duplicate" not in fewer.counts
    assert all_kinds.counts["missing_final"] == fewer.counts["missing_final"]
    assert all_kinds.true_bars == fewer.true_bars


def test_second_client_changes_nothing_for_the_first() -> None:
    faults = Faults(seed=6, duplicate=0.1, revised=0.1, garbage=0.1, disorder=0.1)

    async def scene(exchange: SimulatedExchange) -> Recording:
        first, _ = await asyncio.gather(record_streams(exchange, 60), record_streams(exchange, 30))
        return first

    assert run_exchange(faults, scene).messages == record_with_faults(faults, 60).messages


def test_random_faults_depend_on_the_seed_and_survive_json() -> None:
    mixtures = [Faults.random(seed) for seed in range(200)]
    assert mixtures == [Faults.random(seed) for seed in range(200)]
    assert len(set(mixtures)) == 200
    assert [Faults.parse(mixture.dumps()) for mixture in mixtures] == mixtures
    plan = Faults(
        seed=1, plan=(PlannedFault("drop", 3.0), PlannedFault("late", 1.0, symbol="SIM00/USDT"))
    )
    assert Faults.parse(plan.dumps()) == plan


def test_faults_are_parsed_from_presets_and_json_or_rejected() -> None:
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
def test_with_random_faults_closed_bars_are_always_true_versions(seed: int) -> None:
    """Every closing event is a version that the bar had."""
    faults = Faults.random(seed)

    async def scene(exchange: SimulatedExchange) -> None:
        finals: dict[tuple[str, int], list[Candle]] = defaultdict(list)
        ends = exchange.clock.now() + 120_000
        while exchange.clock.now() < ends:
            recording = await record_streams(exchange, (ends - exchange.clock.now()) / 1000)
            for name, klines in recording.klines.items():
                for kline in klines:
                    if kline.closed:
                        finals[name, kline.candle.time].append(kline.candle)
            await asyncio.sleep(1)
        assert len(finals) > 50
        for i, name in enumerate(STREAMS):
            series = Series.parse(f"any:SIM0{i}/USDT:1s")
            for bar in exchange.truth(series, START):
                candles = finals.get((name, bar.candle.time), [])
                versions = exchange.versions(series, bar.candle.time)
                assert not (bar.synthetic and candles)
                assert all(candle in versions for candle in candles)

    run_exchange(faults, scene)
