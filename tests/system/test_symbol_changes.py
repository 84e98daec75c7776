"""Symbols of two venues that change constantly: no bar is lost, and nothing is left behind.

While a series is subscribed, every bar has one outcome; once it is added again, so have the bars
that closed in between. A bar whose forecast is under way when the series is removed gets the
outcome "removed" instead. KRONOS_SEEDS=<seed> repeats the changes of a failed run.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf
from operator import le
from pathlib import Path
from random import Random

import pytest

from kronos_stream.daemon.requests import Outcome
from kronos_stream.forecast.message import Forecast, Removal
from kronos_stream.market.series import Series
from tests.support.apache_kafka import ApacheKafka
from tests.support.daemon_process import DaemonProcess
from tests.support.exchange_process import ExchangeProcess
from tests.support.forecast_audit import audit_forecasts, is_removal, read_topic
from tests.support.processes import wait_for

SEED = int(os.environ.get("KRONOS_SEEDS", "6").split(",")[0].partition("-")[0])
SOAK_CHANGES = int(os.environ.get("KRONOS_SOAK_CHANGES", "200"))
LONG = pytest.param(
    SOAK_CHANGES, True, marks=[pytest.mark.soak, pytest.mark.timeout(5 * SOAK_CHANGES + 300)]
)

VENUES = ("binance", "ccxt.binance")
SYMBOLS = 20
LEAST = "SIM12/USDT"
"""One-second bars are added and removed from this symbol on; those before it stay."""
LONGER = range(8, 16)
"""Symbols whose five-second bars are added and removed, too."""
CALM_SECONDS = 2.4
"""Longest pause between two changes; sometimes there is none."""

TAKEN_IN_SECONDS = 1.0
"""Time until bars of a new series are stored."""
UNDER_WAY_SECONDS = 4.0
"""Time from a bar's close, or from the return of its series, to its forecast; with ccxt a bar must
first be confirmed by a request."""
COMPOSED_SECONDS = 0.25
"""A forecast may be composed so long before its series is known to be added again."""
WATCHED_SECONDS = SYMBOLS * 0.4
"""A client of ccxt subscribes one series after the other, with a task for each."""
SPARE = 4
"""Additional descriptors and tasks allowed for requests in progress."""

BAD = (
    "binance:NONE/USDT",
    "binance:SIM01/USDT 1x",
    "ccxt.binance:NONE/USDT 1s",
    "ccxt.binance:SIM01/USDT 7m",
    "kraken:BTC/USDT",
    "SIM01/USDT",
)
ANSWERS = ("series changed", "symbols not changed")

Records = Sequence[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class WatchlistChange:
    """Series subscribed from a time on, in Unix seconds."""

    requested: float
    done: float
    series: frozenset[Series]


def _lines(series: Collection[Series]) -> list[str]:
    """Lines of a symbols file for series."""
    lengths: defaultdict[str, list[str]] = defaultdict(list)
    for one in sorted(series):
        lengths[f"{one.venue}:{one.symbol}"].append(str(one.timeframe))
    return [f"{name} {','.join(some)}" for name, some in lengths.items()]


class WatchlistChanger:
    """Changes the symbols file of a running daemon, and records the changes."""

    def __init__(self, daemon: DaemonProcess, listed: Path, random: Random) -> None:
        self.changes: list[WatchlistChange] = []
        self.refused = 0
        self._daemon, self._listed, self._random = daemon, listed, random
        seconds = [Series.parse(f"{v}:SIM{i:02}/USDT:1s") for v in VENUES for i in range(SYMBOLS)]
        longer = [Series.parse(f"{v}:SIM{i:02}/USDT:5s") for v in VENUES for i in LONGER]
        self.first = frozenset(seconds)
        self.all = [*seconds, *longer]
        self._changing = [one for one in self.all if one.symbol >= LEAST or one in longer]
        self._write(_lines(self.first))

    def started(self) -> None:
        """Record that the daemon has loaded the first file."""
        self.changes.append(WatchlistChange(time.time(), time.time(), self.first))

    def change(self) -> None:
        """Add and remove a few series."""
        followed = self.changes[-1].series
        there = [one for one in self._changing if one in followed]
        absent = [one for one in self._changing if one not in followed]
        removed = self._random.sample(there, min(len(there), self._random.randint(1, 4)))
        added = self._random.sample(absent, min(len(absent), self._random.randint(1, 4)))
        self.follow((followed - set(removed)) | set(added))
        if self._random.random() < 0.75:
            time.sleep(self._random.uniform(0.0, CALM_SECONDS))

    def write_invalid(self) -> None:
        """Write a file with an invalid line, which the daemon must reject as a whole."""
        bad = BAD[self.refused % len(BAD)]
        assert self._reload([*_lines([min(self.first)]), bad]) == ANSWERS[1], bad
        self.refused += 1

    def follow(self, series: Collection[Series]) -> None:
        requested_at = time.time()
        assert self._reload(_lines(series)) == ANSWERS[0]
        self.changes.append(WatchlistChange(requested_at, time.time(), frozenset(series)))

    def spans(self, series: Series) -> list[tuple[WatchlistChange, WatchlistChange | None]]:
        """Changes that added and removed a series; None if it is still subscribed."""
        found: list[tuple[WatchlistChange, WatchlistChange | None]] = []
        for change in self.changes:
            following = bool(found) and found[-1][1] is None
            if series in change.series and not following:
                found.append((change, None))
            elif series not in change.series and following:
                found[-1] = found[-1][0], change
        return found

    def is_forecast(self, latest: Iterable[bytes], since: float) -> bool:
        """Return whether all series have a forecast of a bar that opened after ``since``."""
        found = {
            one.series for one in map(Forecast.parse, latest) if one.origin.timestamp() >= since
        }
        return {series.name for series in self.changes[-1].series} <= found

    def _reload(self, lines: Sequence[str]) -> str:
        """Write the file, and return the daemon's answer in the log."""
        before = len(self._reload_answers())
        self._write(lines)
        self._daemon.signal(signal.SIGHUP)
        wait_for("an answer", lambda: len(self._reload_answers()) > before, interval=0.02)
        return self._reload_answers()[before]

    def _reload_answers(self) -> list[str]:
        return [line["event"] for line in self._daemon.log_records() if line["event"] in ANSWERS]

    def _write(self, lines: Sequence[str]) -> None:
        self._listed.write_text("\n".join(lines), "utf-8")


@pytest.mark.parametrize(("number", "timed"), [(20, False), LONG], ids=["short", "long"])
def test_symbols_change_under_load(
    number: int,
    timed: bool,  # noqa: FBT001
    kafka: ApacheKafka,
    topic_prefix: str,
    tmp_path: Path,
    make_daemon: Callable[..., DaemonProcess],
) -> None:
    listed = tmp_path / "symbols"

    def read(topic: str) -> Records:
        return read_topic(kafka.bootstrap, f"{topic_prefix}.{topic}.v1")

    with ExitStack() as stack:
        arguments = ["--symbols", str(SYMBOLS), "--timeframe", "1s,5s", "--history", "120"]
        exchanges = {
            venue: stack.enter_context(ExchangeProcess(*arguments, "--seed", str(seed)))
            for seed, venue in enumerate(VENUES)
        }
        settings = _settings(listed, exchanges["ccxt.binance"])
        daemon = stack.enter_context(make_daemon(exchanges["binance"], kafka.bootstrap, **settings))
        changer = WatchlistChanger(daemon, listed, Random(SEED))

        def all_forecast(since: float) -> bool:
            values = dict(read("forecasts.latest")).values()
            return changer.is_forecast(filter(None, values), since)

        began = time.time()
        daemon.start()
        daemon.wait_until_ready()
        changer.started()
        wait_for("forecasts of all", lambda: all_forecast(0.0), interval=1.0)
        time.sleep(WATCHED_SECONDS)
        before = _resource_counts(daemon)
        for i in range(number):
            changer.change()
            if i % 4 == 0:
                changer.write_invalid()
        changer.follow(changer.first)
        last = changer.changes[-1].done
        wait_for("forecasts of all", lambda: all_forecast(last), interval=1.0)
        most = [count + SPARE for count in before]
        wait_for(f"it holds at most {most}", lambda: all(map(le, _resource_counts(daemon), most)))
        print(f"seed {SEED}: {number} changes; {before} → {_resource_counts(daemon)}")  # noqa: T201
        assert daemon.stop() == 0
        assert {e["event"] for e in daemon.log_records() if e.get("level") == "error"} <= set(
            ANSWERS
        )
        outcomes = daemon.outcomes(changer.all)
        end = time.time()
        truth = {
            one: exchanges[one.venue].closed_bar_times(one, round(1000 * began), round(1000 * end))
            for one in changer.all
        }
    records, newest = read("forecasts"), read("forecasts.latest")
    _assert_no_bar_is_lost(changer, outcomes, truth, records)
    _assert_nothing_is_stale(changer, records, newest, COMPOSED_SECONDS if timed else inf)
    if timed:
        _assert_changes_are_fast(changer, outcomes, truth, records)


def _settings(listed: Path, exchange: ExchangeProcess) -> dict[str, str]:
    """Settings for symbols of both venues by file, the second connected to ``exchange``."""
    lengths = {length: length for length in exchange.timeframes}
    urls = {"public": f"{exchange.rest_url}/api/v3", "ws": {"spot": f"{exchange.ws_url}/ws/stream"}}
    markets = {"fetchMarkets": {"types": ["spot"]}}
    config = {"binance": {"urls": {"api": urls}, "options": markets, "timeframes": lengths}}
    return {
        "SYMBOLS": "",
        "SYMBOLS_FILE": str(listed),
        "CATCH_UP": "all",
        "CCXT__CONFIG": json.dumps(config),
    }


def _resource_counts(daemon: DaemonProcess) -> list[int]:
    """Numbers of descriptors, sockets and tasks of a daemon."""
    opened = daemon.open_files()
    sockets = sum(one.startswith("socket:") for one in opened)
    return [len(opened), sockets, round(daemon.metric("kronos_tasks"))]


def _assert_no_bar_is_lost(
    changer: WatchlistChanger,
    outcomes: Mapping[Series, Sequence[Outcome]],
    truth: Mapping[Series, Sequence[int]],
    records: Records,
) -> None:
    """Every bar from a series' first outcome to its last has one, and its forecast is published."""
    last = changer.changes[-1]
    for series, closed in truth.items():
        origins = [outcome.origin for outcome in outcomes[series]]
        assert origins == [bar for bar in closed if origins and origins[0] <= bar <= origins[-1]]
        if series in last.series:
            assert origins[-1] >= 1_000 * last.done, series
        reasons = {one.reason for one in outcomes[series] if one.result != "forecast"}
        assert reasons <= {"removed"}, series
    due = {
        series: [outcome.origin for outcome in some if outcome.result == "forecast"]
        for series, some in outcomes.items()
    }
    report = audit_forecasts(records, due)
    assert report.problems == []
    assert report.duplicates == 0
    assert report.records == sum(map(len, due.values()))


def _assert_changes_are_fast(
    changer: WatchlistChanger,
    outcomes: Mapping[Series, Sequence[Outcome]],
    truth: Mapping[Series, Sequence[int]],
    records: Records,
) -> None:
    """Bars are due soon after their series is added, and forecast soon after their close."""
    due: dict[Series, list[int]] = {}
    longest, last = 0.0, changer.changes[-1].done
    for series, closed in truth.items():
        spans = changer.spans(series)
        must = [
            (
                began.done + TAKEN_IN_SECONDS,
                last if ended is None else ended.requested - UNDER_WAY_SECONDS,
            )
            for began, ended in spans
        ]
        closes = {bar: series.timeframe.after(bar) / 1000 for bar in closed}
        due[series] = [
            bar for bar in closed if any(a <= bar / 1000 and closes[bar] <= b for a, b in must)
        ]
        for outcome in outcomes[series]:
            if outcome.result != "forecast":
                # Under way since its close, or since its series was added again.
                close = closes[outcome.origin]
                ends = [
                    (a.requested, b.done) for a, b in spans if b is not None and close <= b.done
                ]
                under_way = min((end - max(close, began) for began, end in ends), default=inf)
                longest = max(longest, under_way)
    counts = Counter(outcome.result for some in outcomes.values() for outcome in some)
    print(f"{sum(map(len, due.values()))} bars due, {dict(counts)}; {longest:.1f} s under way")  # noqa: T201
    assert audit_forecasts(records, due).problems == []
    assert longest <= UNDER_WAY_SECONDS


def _assert_nothing_is_stale(
    changer: WatchlistChanger, records: Records, newest: Records, composed_seconds: float
) -> None:
    published: defaultdict[str, list[bytes]] = defaultdict(list)
    for key, value in records:
        published[key].append(value)
    last = dict(newest)
    assert {one.name for change in changer.changes for one in change.series} >= published.keys()
    removals = 0
    for name, values in published.items():
        spans = changer.spans(Series.parse(name))
        ends = [ended for _, ended in spans if ended is not None]
        removal_count = 0
        for value in values:
            if is_removal(value):
                at = Removal.parse(value).at.timestamp()
                assert ends[removal_count].requested - 0.001 <= at <= ends[removal_count].done, name
                removal_count += 1
                continue
            # After a removal, forecasts come only once the series was added again.
            assert removal_count < len(spans), f"{name} was forecast after its removal"
            made = Forecast.parse(value).created_at.timestamp()
            assert (
                made >= spans[removal_count][0].requested - composed_seconds or removal_count == 0
            ), name
            assert removal_count == len(ends) or made <= ends[removal_count].done, name
        assert removal_count == len(ends), name
        removals += removal_count
        assert last[name] == (values[-1] if spans[-1][1] is None else b""), name
    again = sum(len(changer.spans(one)) > 1 for one in changer.all)
    print(f"{removals} removals of {len(published)} series; {again} series were added again")  # noqa: T201
    assert min(again, removals) > 0
