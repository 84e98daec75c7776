"""Faults of the simulated exchange that affect bars: missing, late, revised, lost, garbage."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import aiohttp

from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.series import Series
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
    rest_opens,
    run_exchange,
)


def test_without_faults_bars_are_closed_once_and_in_order() -> None:
    recording = record_with_faults(Faults())
    assert recording.invalid == []
    for name in STREAMS:
        finals = [k.candle for k in recording.klines[name] if k.closed]
        assert finals == [bar.candle for bar in recording.true_bars[name]][: len(finals)]
        assert len(finals) >= 29
    assert recording.counts == {}


def test_missing_final_leaves_the_bar_in_rest() -> None:
    async def scene(exchange: SimulatedExchange) -> tuple[Recording, list[int]]:
        return await record_streams(exchange, 10), await rest_opens(exchange)

    recording, rows = run_exchange(planned("missing_final", 5, symbol="SIM00/USDT"), scene)
    assert recording.finals(STREAMS[0], 4000) == []
    assert len(recording.finals(STREAMS[0], 5000)) == len(recording.finals(STREAMS[1], 4000)) == 1
    assert 4000 in rows
    assert recording.counts == {"missing_final": 1}


def test_duplicate_repeats_the_closing_event() -> None:
    recording = record_with_faults(planned("duplicate", 5, symbol="SIM00/USDT"), 10)
    first, second = recording.finals(STREAMS[0], 4000)
    assert first.candle == second.candle
    assert second.at - first.at == 300
    assert len(recording.finals(STREAMS[0], 5000)) == 1


def test_revised_bar_is_pushed_again_and_changed_in_rest() -> None:
    async def scene(
        exchange: SimulatedExchange,
    ) -> tuple[Recording, list[Candle], list[Any]]:
        recording = await record_streams(exchange, 10)
        series = Series.parse("any:SIM00/USDT:1s")
        url = f"{exchange.rest_url}/api/v3/klines?symbol=SIM00USDT&interval=1s"
        async with (
            aiohttp.ClientSession() as http,
            http.get(f"{url}&startTime={START + 4000}&limit=1") as answer,
        ):
            return recording, exchange.versions(series, START + 4000), await answer.json()

    recording, versions, rows = run_exchange(planned("revised", 5, symbol="SIM00/USDT"), scene)
    first, second = recording.finals(STREAMS[0], 4000)
    assert second.at - first.at == 2000
    assert [first.candle, second.candle] == versions
    assert first.candle.close != second.candle.close
    assert second.candle.invalid_reason() is None
    assert recording.true_bars[STREAMS[0]][4] == Bar(second.candle, revision=1)
    assert [float(number) for number in rows[0][1:6]] == list(second.candle[1:6])


def test_late_final_arrives_after_the_bar_is_in_rest() -> None:
    async def scene(exchange: SimulatedExchange) -> tuple[Recording, list[int]]:
        listening = asyncio.create_task(record_streams(exchange, 12))
        await asyncio.sleep(5.5)
        rows = await rest_opens(exchange)
        return await listening, rows

    recording, rows = run_exchange(planned("late", 5, symbol="SIM00/USDT"), scene)
    (final,) = recording.finals(STREAMS[0], 4000)
    assert 8000 <= final.at <= 8050  # three seconds
    assert final.event == final.at
    assert 4000 in rows
    assert len(recording.finals(STREAMS[0], 5000)) == 1


def test_disorder_swaps_events_without_losing_any() -> None:
    recording = record_with_faults(Faults(seed=1, disorder=0.5), 60)
    overtaken = overtaking = 0
    for klines in recording.klines.values():
        for a, b in pairwise(klines):
            overtaken += b.closed and a.candle.time > b.candle.time
            overtaking += a.closed and not b.closed and a.candle.time == b.candle.time
    assert overtaken > 5
    assert overtaking > 5
    for name in STREAMS:  # no bar is lost
        finals = {k.candle for k in recording.klines[name] if k.closed}
        assert {bar.candle for bar in recording.true_bars[name][:-3]} <= finals


def test_hidden_bar_appears_later_in_rest() -> None:
    async def scene(exchange: SimulatedExchange) -> list[list[int]]:
        found = []
        for _ in range(3):
            await asyncio.sleep(2.75)
            found.append(await rest_opens(exchange))
        return found

    early, hidden, there = run_exchange(planned("hidden", 5), scene)
    assert early == [0, 1000, 2000]
    assert hidden == [0, 1000, 2000, 3000, 5000]
    assert there == list(range(0, 9000, 1000))


def test_lost_bar_is_sent_nowhere_and_synthetic_in_truth() -> None:
    async def scene(exchange: SimulatedExchange) -> tuple[Recording, list[int]]:
        return await record_streams(exchange, 20), await rest_opens(exchange)

    recording, rows = run_exchange(planned("lost", 5, seconds=2.5, symbol="SIM00/USDT"), scene)
    assert [ms for ms in range(0, 20_000, 1000) if ms not in rows] == [4000, 5000, 6000]
    times = {k.candle.time - START for k in recording.klines[STREAMS[0]]}
    assert not times & {4000, 5000, 6000}
    assert {3000, 7000} <= times
    truth = recording.true_bars[STREAMS[0]]
    close = truth[3].candle.close
    assert [bar.synthetic for bar in truth[3:8]] == [False, True, True, True, False]
    assert truth[5].candle == Candle(START + 5000, close, close, close, close, 0.0, 0.0)
    assert not any(bar.synthetic for bar in recording.true_bars[STREAMS[1]])


def test_garbage_never_parses_as_a_wrong_candle() -> None:
    recording = record_with_faults(Faults(seed=5, garbage=0.5), 120)
    assert len(recording.invalid) > 150
    assert len(set(recording.invalid)) > 50
    closed = {(name, bar.candle) for name in STREAMS for bar in recording.true_bars[name]}
    for name in STREAMS:
        finals = [k.candle for k in recording.klines[name] if k.closed]
        assert {(name, candle) for candle in finals} <= closed
        assert len(finals) < len(recording.true_bars[name]) - 10  # some replaced closing events


def test_silence_affects_one_symbol() -> None:
    async def scene(exchange: SimulatedExchange) -> tuple[Recording, list[int]]:
        return await record_streams(exchange, 20), await rest_opens(exchange)

    faults = planned("silence", 5, seconds=6, symbol="SIM00/USDT")
    recording, rows = run_exchange(faults, scene)
    assert not [k for k in recording.klines[STREAMS[0]] if 5000 <= k.at < 11_000]
    assert [k for k in recording.klines[STREAMS[0]] if k.at >= 11_000]
    for name in STREAMS[1:]:
        assert len([k for k in recording.klines[name] if k.closed and 5000 <= k.at < 11_000]) == 6
    assert rows == list(range(0, 21_000, 1000))
