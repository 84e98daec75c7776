"""Chaos runs: whatever the exchange does, each closed bar is stored and forecast once.

Each seed is a run (:mod:`tests.support.chaos`). To repeat one that failed:

    KRONOS_SEEDS=123 make test ARGS="tests/system/test_chaos.py -k test_seed"

``KRONOS_SEEDS`` takes numbers and ranges, such as ``7,100-1099``; without it, ``make test`` runs
20 seeds and ``make soak`` 200.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kronos_stream.interfaces.source import Source, SourceCallbacks
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.series import Series
from kronos_stream.testing.exchange import Faults
from tests.support.chaos import run_chaos
from tests.support.chaos_checks import check_seed, find_violations
from tests.support.chaos_scenario import RunLog, Scenario, selected_seeds


@pytest.mark.parametrize("seed", selected_seeds(range(20)))
def test_seed(seed: int, tmp_path: Path) -> None:
    check_seed(seed, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("seed", selected_seeds(range(1000, 1200)))
def test_soak_seed(seed: int, tmp_path: Path) -> None:
    check_seed(seed, tmp_path)


def run_summary(log: RunLog) -> object:
    """Forecasts, outcomes and stored bars of a run.

    Sockets that become ready at the same time are read in any order, so the order of requests may
    differ between two runs.
    """
    forecasts = [
        (window.series, window.last, window.revision, window.values.tobytes())
        for window in (call.window for call in log.forecasts)
    ]
    bars = {
        series: [(bar.candle, bar.revision, bar.synthetic) for bar in stored]
        for series, stored in log.stored_bars.items()
    }
    return sorted(forecasts), log.outcomes, bars


@pytest.mark.parametrize("seed", [3, 5])
def test_same_seed_gives_the_same_run(seed: int, tmp_path: Path) -> None:
    scenario = replace(Scenario.from_seed(seed), seconds=60.0)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert run_summary(run_chaos(scenario, first)) == run_summary(run_chaos(scenario, second))


CALM = Scenario(seed=0, faults=Faults(), timeframes=("1s",), symbols=2, seconds=30.0)


def test_without_faults_bars_are_forecast_within_a_virtual_second(tmp_path: Path) -> None:
    log = run_chaos(CALM, tmp_path)
    assert find_violations(log) == []
    after = log.series[0].timeframe.after
    late = [call.time - after(call.window.last.time) for call in log.forecasts]
    assert len(late) >= 2 * 29
    assert max(late) < 1000


class TamperingSource:
    """A source whose pushes are changed by a function."""

    def __init__(self, source: Source, tamper: Callable[[Update], Sequence[Update]]) -> None:
        self._source, self._tamper = source, tamper
        self.venue, self.traits = source.venue, source.traits

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:
        return await self._source.unsupported(series)

    def subscribe(self, series: Collection[Series]) -> None:
        self._source.subscribe(series)

    async def run(self, callbacks: SourceCallbacks) -> None:
        def update(update: Update) -> None:
            for tampered in self._tamper(update):
                callbacks.update(tampered)

        await self._source.run(SourceCallbacks(update, callbacks.reject, callbacks.count_event))

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        return await self._source.history(series, start, end)

    async def close(self) -> None:
        await self._source.close()


def raise_close(update: Update) -> list[Update]:
    """Raise the high of every seventh closed bar."""
    candle = update.candle
    if not update.closed or candle.time // 1000 % 7:
        return [update]
    return [update._replace(candle=candle._replace(high=candle.high + 0.01))]


def close_early(update: Update) -> list[Update]:
    """Mark every push as final."""
    return [update._replace(closed=True)]


@pytest.mark.parametrize("tamper", [raise_close, close_early])
def test_tampered_source_is_detected(
    tamper: Callable[[Update], Sequence[Update]], tmp_path: Path
) -> None:
    """Chaos runs can fail."""
    log = run_chaos(CALM, tmp_path, wrap_source=lambda source: TamperingSource(source, tamper))
    assert find_violations(log) != []
