"""The verdict on a trial: what the daemon did, compared with the exchange's truth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np
import orjson

from kronos_stream.daemon.requests import Outcome
from kronos_stream.forecast.message import VOLATILE
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.series import Series
from kronos_stream.market.utc import rfc3339
from tests.support.chaos import (
    CONSISTENCY_SECONDS,
    REPAIR_SECONDS,
    ForecastCall,
    RunLog,
    context_rows,
)

_MAX_LINES = 12
_MAX_TASKS = 120
_RECHECKED_BARS = 128
"""Bars that may be asked for again now and then: the venue may have changed them."""

_MAX_SHUTDOWN_SECONDS = 25.0


def find_violations(journal: RunLog) -> list[str]:
    """Everything that should not be, a line each; empty if all is well."""
    found = list(journal.errors)
    if journal.repaired_after is None:
        found.append(f"not mended within {REPAIR_SECONDS:g} s of the end of all faults")
    elif journal.consistent_after is None:
        found.append(f"a change of a bar was not noticed within {CONSISTENCY_SECONDS:g} s")
    if journal.max_tasks > _MAX_TASKS:
        found.append(f"{journal.max_tasks} tasks at once")
    found += [
        f"life {number} took {life.shutdown_seconds:.1f} s to end"
        for number, life in enumerate(journal.runs)
        if life.shutdown_seconds > _MAX_SHUTDOWN_SECONDS
    ]
    for series in journal.series:
        truth = _TrueSeries(journal, series)
        lines = [
            *_check_bars(journal, truth),
            *_check_forecasts(journal, truth),
            *_check_outcomes(journal, series),
            *_check_deliveries(journal, series),
            *_check_history_requests(journal, series),
        ]
        found += [f"{series}: {line}" for line in lines[:_MAX_LINES]]
        if len(lines) > _MAX_LINES:
            found.append(f"{series}: and {len(lines) - _MAX_LINES} more")
    return found


class _TrueSeries:
    """One series as it was, in all its versions."""

    def __init__(self, journal: RunLog, series: Series) -> None:
        self.series = series
        self.bars = {bar.candle.time: bar for bar in journal.truth[series]}
        self._versions = {
            opened: versions
            for (one, opened), versions in journal.versions.items()
            if one == series
        }
        self.closes = {c.close for time in self.bars for c in self.versions(time)}
        self._rows: dict[int, list[bytes]] = {}

    def versions(self, opened: int) -> list[Candle]:
        """All that the venue ever said the closed bar was; none if it never had it."""
        bar = self.bars.get(opened)
        if bar is None or bar.synthetic:
            return []
        return self._versions.get(opened) or [bar.candle]

    def is_version(self, opened: int, row: bytes) -> bool:
        """Whether a context's row is a version of the bar."""
        known = self._rows.get(opened)
        if known is None:
            known = [context_rows([Bar(candle)]).tobytes() for candle in self.versions(opened)]
            self._rows[opened] = known
        return row in known


def _check_bars(journal: RunLog, truth: _TrueSeries) -> Iterator[str]:
    """The tape in the end: what the venue has, and flat bars for what it has not."""
    tape = {bar.candle.time: bar for bar in journal.stored_bars[truth.series]}
    after = truth.series.timeframe.after
    if not tape:
        yield "no bar on the tape"
    for earlier, later in pairwise(tape):
        if after(earlier) != later:
            yield f"after bar {earlier} comes {later}"
    for opened, true in truth.bars.items():
        if (
            opened >= min(tape, default=0)
            and opened not in tape
            and after(opened) <= journal.compared_until
        ):
            yield f"bar {opened} is lost: {true}"
    for opened, bar in tape.items():
        wrong = _bar_violation(bar, truth)
        if wrong and after(opened) <= journal.compared_until:
            yield f"bar {opened} {wrong}: {bar}, but {truth.bars.get(opened)}"


def _bar_violation(bar: Bar, truth: _TrueSeries) -> str:
    """What is wrong with a bar on the tape; empty if nothing is."""
    true = truth.bars.get(bar.candle.time)
    if true is None:
        return "is none of the venue's"
    if bar.synthetic and true.synthetic:
        _, opened, high, low, close, volume, _ = bar.candle
        flat = opened == high == low == close and volume == 0
        return "" if flat and close in truth.closes else "is not flat at a close before it"
    if bar.synthetic:
        return "is synthetic, but the venue has it"
    if true.synthetic:
        return "is not synthetic, but the venue never had it"
    if bar.candle not in truth.versions(bar.candle.time):
        return "was never such"
    return "" if bar.candle == true.candle else "is not the last version"


def _check_forecasts(journal: RunLog, truth: _TrueSeries) -> Iterator[str]:
    """What was forecast from: closed bars without a hole, each as the venue said it was."""
    twice: Counter[tuple[int, int, int]] = Counter()
    for one in journal.forecasts:
        if one.window.series != truth.series:
            continue
        origin, close = one.window.last.time, truth.series.timeframe.after(one.window.last.time)
        twice[one.run, origin, one.window.revision] += 1
        if one.time < close:
            yield f"bar {origin} was forecast {close - one.time} ms before its close"
        yield from _check_window(one, truth)
    for (life, origin, revision), times in twice.items():
        if times > 1:
            yield f"bar {origin} revision {revision} was forecast {times} times in life {life}"


def _check_window(forecast: ForecastCall, truth: _TrueSeries) -> Iterator[str]:
    window, after = forecast.window, truth.series.timeframe.after
    times = window.times.tolist()
    if times[-1] != window.last.time or any(after(a) != b for a, b in pairwise(times)):
        yield f"the window of {window.last.time} has a hole"
    flat = np.ptp(window.values[:, :4], axis=1) == 0
    strange = [
        i for i, time in enumerate(times) if not truth.is_version(time, window.values[i].tobytes())
    ]
    for i in strange:
        if not flat[i] or window.values[i, 4] != 0:
            yield (
                f"the window of {window.last.time}, at {forecast.time}, holds bar {times[i]} as "
                f"{window.values[i].tolist()}, but {truth.bars.get(times[i])}"
            )
    if not len(strange) <= window.synthetic <= int(flat.sum()):
        yield (
            f"the window of {window.last.time} has {len(strange)} synthetic bars "
            f"and says {window.synthetic}"
        )
    if strange and not window.reasons:
        yield f"the window of {window.last.time} does not say that it is degraded"


def _check_outcomes(journal: RunLog, series: Series) -> Iterator[str]:
    """Each bar since the beginning has one outcome; all are forecast, the newest revision last."""
    outcomes = journal.outcomes[series]
    if not outcomes or not journal.history_requests:
        yield "no bar has an outcome"
        return
    after = series.timeframe.after
    newest = {one.origin: one for one in outcomes}
    for earlier, later in pairwise(newest):
        if after(earlier) != later:
            yield f"after the outcome of {earlier} comes that of {later}"
    first, last = next(iter(newest)), next(reversed(newest))
    began = min(one.time for one in journal.history_requests if one.series == series)
    skew = 1000 * (abs(journal.scenario.faults.skew_seconds) + 1)
    if first - after(began) > skew:
        yield f"the first outcome is that of {first}, {first - began} ms after the beginning"
    for bar in journal.stored_bars[series]:
        if last < bar.candle.time and after(bar.candle.time) <= journal.compared_until:
            yield f"bar {bar.candle.time} has no outcome"
    made = _newest_forecast_revisions(journal, series)
    for outcome in outcomes:
        wrong = _outcome_violation(outcome, newest[outcome.origin], made)
        if wrong:
            yield f"bar {outcome.origin} revision {outcome.revision} was {wrong}"


def _newest_forecast_revisions(journal: RunLog, series: Series) -> dict[int, int]:
    """The newest revision of each bar that was forecast, by open."""
    made: dict[int, int] = {}
    for forecast in journal.forecasts:
        if forecast.window.series == series:
            origin = forecast.window.last.time
            made[origin] = max(made.get(origin, 0), forecast.window.revision)
    return made


def _outcome_violation(outcome: Outcome, newest: Outcome, made: Mapping[int, int]) -> str:
    """What is wrong with it; empty if nothing is."""
    if outcome.result == "forecast":
        # A bar may be changed while it waits; then it is forecast as it has become.
        return "" if made.get(outcome.origin, -1) >= outcome.revision else "not forecast after all"
    superseded = outcome.reason == "revised" and newest.revision > outcome.revision
    return "" if superseded else f"skipped: {outcome.reason}"


def _check_deliveries(journal: RunLog, series: Series) -> Iterator[str]:
    """Each forecast arrived, first ones in order; those that came again were the same."""
    known: dict[str, object] = {}
    order: list[tuple[str, int]] = []
    arrived: dict[str, int] = {}
    for record in journal.delivered:
        if record.kind != "forecast" or record.key != series.name:
            continue
        said = orjson.loads(record.value)
        content = {name: value for name, value in said.items() if name not in VOLATILE}
        if known.setdefault(said["id"], content) != content:
            yield f"two forecasts from {said['origin']} have one id and differ"
        origin, revision = said["origin"], said["revision"]
        if arrived.get(origin, -1) < revision:
            arrived[origin] = revision
            order.append((origin, revision))
    if order != sorted(order):
        yield "forecasts arrived out of order"
    for outcome in journal.outcomes[series]:
        newest = arrived.get(rfc3339(outcome.origin), -1)
        if outcome.result == "forecast" and newest < outcome.revision:
            yield f"the forecast of bar {outcome.origin} did not arrive"


def _check_history_requests(journal: RunLog, series: Series) -> Iterator[str]:
    """After a restart only what is missing is asked for, but for a look at the newest bars."""
    after = series.timeframe.after
    for number, life in enumerate(journal.runs):
        known = life.initial_bars[series]
        if not known:
            continue
        owed = [bar.candle.time for bar in known if bar.synthetic and not bar.received]
        first = min([known[-1].candle.time, *owed])
        for one in journal.history_requests:
            if one.series != series or one.run != number or one.start >= first:
                continue
            if after(one.start, _RECHECKED_BARS) < one.end:
                yield f"life {number} knew bars up to {first} and asked for {one.start}-{one.end}"
