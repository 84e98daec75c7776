"""Whatever the exchange does, each closed bar ends up on the tape and is forecast once.

A seed is a trial (:mod:`tests.support.chaos`). One that fails is played again by

    KRONOS_SEEDS=123 make test ARGS="tests/system/test_chaos.py -k test_seed"

``KRONOS_SEEDS`` takes numbers and ranges, such as ``7,100-1099``; without it, ``make test`` plays
20 seeds and ``make soak`` 200.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kronos_stream.interfaces.source import Source, SourceCallbacks
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.series import Series
from kronos_stream.testing.exchange import Faults
from tests.support.chaos import RunLog, Scenario, run_chaos
from tests.support.chaos_checks import find_violations


def seeds(default: range) -> list[int]:
    """Those of KRONOS_SEEDS, or ``default``."""
    chosen: list[int] = []
    for part in os.environ.get("KRONOS_SEEDS", "").split(","):
        first, _, last = part.strip().partition("-")
        if first:
            chosen += range(int(first), int(last or first) + 1)
    return chosen or list(default)


def run_seed(seed: int, folder: Path) -> None:
    script = Scenario.from_seed(seed)
    journal = run_chaos(script, folder)
    found = find_violations(journal)
    if found:
        pytest.fail(
            "\n".join([str(script), f"struck: {journal.fault_counts}", *found]), pytrace=False
        )


@pytest.mark.parametrize("seed", seeds(range(20)))
def test_seed(seed: int, tmp_path: Path) -> None:
    run_seed(seed, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("seed", seeds(range(1000, 1200)))
def test_soak_seed(seed: int, tmp_path: Path) -> None:
    run_seed(seed, tmp_path)


def run_summary(journal: RunLog) -> object:
    """What a run comes to.

    Sockets that are ready at one moment are read in any order, so who is asked first may differ.
    """
    forecasts = [
        (window.series, window.last, window.revision, window.values.tobytes())
        for window in (one.window for one in journal.forecasts)
    ]
    tapes = {
        series: [(bar.candle, bar.revision, bar.synthetic) for bar in bars]
        for series, bars in journal.stored_bars.items()
    }
    return sorted(forecasts), journal.outcomes, tapes


@pytest.mark.parametrize("seed", [3, 5])
def test_a_seed_plays_the_same_way_again(seed: int, tmp_path: Path) -> None:
    script = replace(Scenario.from_seed(seed), seconds=60.0)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert run_summary(run_chaos(script, first)) == run_summary(run_chaos(script, second))


CALM = Scenario(seed=0, faults=Faults(), timeframes=("1s",), symbols=2, seconds=30.0)


def test_without_faults_each_bar_is_forecast_within_a_second(tmp_path: Path) -> None:
    journal = run_chaos(CALM, tmp_path)
    assert find_violations(journal) == []
    after = journal.series[0].timeframe.after
    late = [one.time - after(one.window.last.time) for one in journal.forecasts]
    assert len(late) >= 2 * 29
    assert max(late) < 1000


class TamperingSource:
    """A source that lies as ``lie`` does."""

    def __init__(self, source: Source, tamper: Callable[[Update], Sequence[Update]]) -> None:
        self._source, self._tamper = source, tamper
        self.venue, self.traits = source.venue, source.traits

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:
        return await self._source.unsupported(series)

    def subscribe(self, series: Collection[Series]) -> None:
        self._source.subscribe(series)

    async def run(self, callbacks: SourceCallbacks) -> None:
        def update(update: Update) -> None:
            for one in self._tamper(update):
                callbacks.update(one)

        await self._source.run(SourceCallbacks(update, callbacks.reject, callbacks.count_event))

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        return await self._source.history(series, start, end)

    async def close(self) -> None:
        await self._source.close()


def raise_close(update: Update) -> list[Update]:
    """Every seventh bar."""
    candle = update.candle
    if not update.closed or candle.time // 1000 % 7:
        return [update]
    return [update._replace(candle=candle._replace(high=candle.high + 0.01))]


def close_early(update: Update) -> list[Update]:
    return [update._replace(closed=True)]


@pytest.mark.parametrize("lie", [raise_close, close_early])
def test_a_source_that_lies_is_found_out(
    lie: Callable[[Update], Sequence[Update]], tmp_path: Path
) -> None:
    """So a trial can fail."""
    journal = run_chaos(CALM, tmp_path, wrap_source=lambda source: TamperingSource(source, lie))
    assert find_violations(journal) != []
