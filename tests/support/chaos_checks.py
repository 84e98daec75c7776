"""Checks of chaos runs: the daemon's bars, forecasts and deliveries against the true bars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import orjson
import pytest

from kronos_stream.daemon.requests import Outcome
from kronos_stream.forecast.message import VOLATILE
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.series import Series
from kronos_stream.market.utc import rfc3339
from tests.support.chaos import (
    BINANCE,
    CONSISTENCY_SECONDS,
    REPAIR_SECONDS,
    ConnectorSetup,
    context_rows,
    run_chaos,
)
from tests.support.chaos_scenario import ForecastCall, RunLog, Scenario

_MAX_LINES = 12
_MAX_TASKS = 120
_RECHECKED_BARS = 128
"""Number of newest bars that may be requested again, because the venue may change them."""

_MAX_SHUTDOWN_SECONDS = 25.0


def check_seed(seed: int, folder: Path, connector: ConnectorSetup = BINANCE) -> None:
    """Run the scenario of a seed, and fail the test with all violations found."""
    scenario = Scenario.from_seed(seed)
    log = run_chaos(scenario, folder, connector=connector)
    if violations := find_violations(log):
        lines = [str(scenario), f"injected faults: {log.fault_counts}", *violations]
        pytest.fail("\n".join(lines), pytrace=False)


def find_violations(log: RunLog) -> list[str]:
    """All violations found, a line each; empty if the run is correct."""
    found = list(log.errors)
    if log.repaired_after is None:
        found.append(f"bars still missing {REPAIR_SECONDS:g} s after the end of all faults")
    elif log.consistent_after is None:
        found.append(f"a change of a bar was not detected within {CONSISTENCY_SECONDS:g} s")
    if log.max_tasks > _MAX_TASKS:
        found.append(f"{log.max_tasks} tasks at once")
    found += [
        f"run {number} took {run.shutdown_seconds:.1f} s to end"
        for number, run in enumerate(log.runs)
        if run.shutdown_seconds > _MAX_SHUTDOWN_SECONDS
    ]
    for series in log.series:
        truth = _TrueSeries(log, series)
        lines = [
            *_check_bars(log, truth),
            *_check_forecasts(log, truth),
            *_check_outcomes(log, series),
            *_check_deliveries(log, series),
            *_check_history_requests(log, series),
        ]
        found += [f"{series}: {line}" for line in lines[:_MAX_LINES]]
        if len(lines) > _MAX_LINES:
            found.append(f"{series}: and {len(lines) - _MAX_LINES} more")
    return found


class _TrueSeries:
    """True bars of one series, in all their versions."""

    def __init__(self, log: RunLog, series: Series) -> None:
        self.series = series
        self.bars = {bar.candle.time: bar for bar in log.truth[series]}
        self._versions = {
            opened: versions
            for (changed, opened), versions in log.versions.items()
            if changed == series
        }
        self.closes = {c.close for time in self.bars for c in self.versions(time)}
        self._rows: dict[int, list[bytes]] = {}

    def versions(self, opened: int) -> list[Candle]:
        """Versions of a closed bar; none if the venue never had it."""
        bar = self.bars.get(opened)
        if bar is None or bar.synthetic:
            return []
        return self._versions.get(opened) or [bar.candle]

    def is_version(self, opened: int, row: bytes) -> bool:
        """Return whether a row of a context is a version of the bar."""
        known = self._rows.get(opened)
        if known is None:
            known = [context_rows([Bar(candle)]).tobytes() for candle in self.versions(opened)]
            self._rows[opened] = known
        return row in known


def _check_bars(log: RunLog, truth: _TrueSeries) -> Iterator[str]:
    """Stored bars equal the venue's; those that it never had are flat."""
    bars = {bar.candle.time: bar for bar in log.stored_bars[truth.series]}
    after = truth.series.timeframe.after
    if not bars:
        yield "no bar is stored"
    for earlier, later in pairwise(bars):
        if after(earlier) != later:
            yield f"bar {earlier} is followed by {later}"
    for opened, true in truth.bars.items():
        if (
            opened >= min(bars, default=0)
            and opened not in bars
            and after(opened) <= log.compared_until
        ):
            yield f"bar {opened} is missing: {true}"
    for opened, bar in bars.items():
        wrong = _bar_violation(bar, truth)
        if wrong and after(opened) <= log.compared_until:
            yield f"bar {opened} {wrong}: {bar}, but {truth.bars.get(opened)}"


def _bar_violation(bar: Bar, truth: _TrueSeries) -> str:
    """Violation of a stored bar; empty if there is none."""
    true = truth.bars.get(bar.candle.time)
    if true is None:
        return "is unknown to the venue"
    if bar.synthetic and true.synthetic:
        _, opened, high, low, close, volume, _ = bar.candle
        flat = opened == high == low == close and volume == 0
        return "" if flat and close in truth.closes else "is not flat at an earlier close"
    if bar.synthetic:
        return "is synthetic, although the venue has it"
    if true.synthetic:
        return "is not synthetic, although the venue never had it"
    if bar.candle not in truth.versions(bar.candle.time):
        return "equals no version"
    return "" if bar.candle == true.candle else "is not the last version"


def _check_forecasts(log: RunLog, truth: _TrueSeries) -> Iterator[str]:
    """Windows of forecasts hold closed bars without gaps, each in a version of the venue."""
    counts: Counter[tuple[int, int, int]] = Counter()
    for call in log.forecasts:
        if call.window.series != truth.series:
            continue
        origin = call.window.last.time
        close = truth.series.timeframe.after(origin)
        counts[call.run, origin, call.window.revision] += 1
        if call.time < close:
            yield f"bar {origin} was forecast {close - call.time} ms before its close"
        yield from _check_window(call, truth)
    for (run, origin, revision), times in counts.items():
        if times > 1:
            yield f"bar {origin} revision {revision} was forecast {times} times in run {run}"


def _check_window(forecast: ForecastCall, truth: _TrueSeries) -> Iterator[str]:
    window, after = forecast.window, truth.series.timeframe.after
    times = window.times.tolist()
    if times[-1] != window.last.time or any(after(a) != b for a, b in pairwise(times)):
        yield f"the window of {window.last.time} has a gap"
    flat = np.ptp(window.values[:, :4], axis=1) == 0
    unknown = [
        i for i, time in enumerate(times) if not truth.is_version(time, window.values[i].tobytes())
    ]
    for i in unknown:
        if not flat[i] or window.values[i, 4] != 0:
            yield (
                f"the window of {window.last.time}, at {forecast.time}, holds bar {times[i]} as "
                f"{window.values[i].tolist()}, but {truth.bars.get(times[i])}"
            )
    if not len(unknown) <= window.synthetic <= int(flat.sum()):
        yield (
            f"the window of {window.last.time} has {len(unknown)} synthetic bars "
            f"and counts {window.synthetic}"
        )
    if unknown and not window.reasons:
        yield f"the window of {window.last.time} is not marked degraded"


def _check_outcomes(log: RunLog, series: Series) -> Iterator[str]:
    """Each bar since the start has one outcome; all are forecast, the newest revision last."""
    outcomes = log.outcomes[series]
    if not outcomes or not log.history_requests:
        yield "no bar has an outcome"
        return
    after = series.timeframe.after
    newest = {outcome.origin: outcome for outcome in outcomes}
    for earlier, later in pairwise(newest):
        if after(earlier) != later:
            yield f"the outcome of {earlier} is followed by that of {later}"
    first, last = next(iter(newest)), next(reversed(newest))
    started = min(request.time for request in log.history_requests if request.series == series)
    skew = 1000 * (abs(log.scenario.faults.skew_seconds) + 1)
    if first - after(started) > skew:
        yield f"the first outcome is that of {first}, {first - started} ms after the start"
    for bar in log.stored_bars[series]:
        if last < bar.candle.time and after(bar.candle.time) <= log.compared_until:
            yield f"bar {bar.candle.time} has no outcome"
    revisions = _newest_forecast_revisions(log, series)
    for outcome in outcomes:
        wrong = _outcome_violation(outcome, newest[outcome.origin], revisions)
        if wrong:
            yield f"bar {outcome.origin} revision {outcome.revision} was {wrong}"


def _newest_forecast_revisions(log: RunLog, series: Series) -> dict[int, int]:
    """Newest revision of each bar that was forecast, by open time."""
    revisions: dict[int, int] = {}
    for forecast in log.forecasts:
        if forecast.window.series == series:
            origin = forecast.window.last.time
            revisions[origin] = max(revisions.get(origin, 0), forecast.window.revision)
    return revisions


def _outcome_violation(outcome: Outcome, newest: Outcome, revisions: Mapping[int, int]) -> str:
    """Violation of an outcome; empty if there is none."""
    if outcome.result == "forecast":
        # A bar that changes while it waits is forecast in its new revision.
        return "" if revisions.get(outcome.origin, -1) >= outcome.revision else "never forecast"
    superseded = outcome.reason == "revised" and newest.revision > outcome.revision
    return "" if superseded else f"skipped: {outcome.reason}"


def _check_deliveries(log: RunLog, series: Series) -> Iterator[str]:
    """Each forecast was delivered, in order; those delivered again are equal."""
    known: dict[str, object] = {}
    order: list[tuple[str, int]] = []
    delivered: dict[str, int] = {}
    for record in log.delivered:
        if record.kind != "forecast" or record.key != series.name:
            continue
        forecast = orjson.loads(record.value)
        content = {name: value for name, value in forecast.items() if name not in VOLATILE}
        if known.setdefault(forecast["id"], content) != content:
            yield f"two forecasts of {forecast['origin']} have the same id and differ"
        origin, revision = forecast["origin"], forecast["revision"]
        if delivered.get(origin, -1) < revision:
            delivered[origin] = revision
            order.append((origin, revision))
    if order != sorted(order):
        yield "forecasts were delivered out of order"
    for outcome in log.outcomes[series]:
        newest = delivered.get(rfc3339(outcome.origin), -1)
        if outcome.result == "forecast" and newest < outcome.revision:
            yield f"the forecast of bar {outcome.origin} was not delivered"


def _check_history_requests(log: RunLog, series: Series) -> Iterator[str]:
    """After a restart only missing bars and the newest ones are requested."""
    after = series.timeframe.after
    for number, run in enumerate(log.runs):
        known = run.initial_bars[series]
        if not known:
            continue
        missing = [bar.candle.time for bar in known if bar.synthetic and not bar.received]
        first = min([known[-1].candle.time, *missing])
        for request in log.history_requests:
            if request.series != series or request.run != number or request.start >= first:
                continue
            if after(request.start, _RECHECKED_BARS) < request.end:
                yield (
                    f"run {number} had bars up to {first} and requested "
                    f"{request.start}-{request.end}"
                )
