"""Scenarios of chaos runs, and logs of what happened in one."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from random import Random
from typing import NamedTuple, Self

from kronos_stream.bars.window import Window
from kronos_stream.daemon.requests import Outcome
from kronos_stream.interfaces.sink import Record
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.series import Series
from kronos_stream.testing.exchange import Faults

_EPOCH = 1_750_000_000_000


class Restart(NamedTuple):
    """A stop of the daemon ``at`` seconds after the start, for ``down_seconds``."""

    at: float
    down_seconds: float
    killed: bool
    """True if its task is cancelled; otherwise it is asked to stop."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Markets, faults and restarts of one chaos run."""

    seed: int
    faults: Faults
    timeframes: tuple[str, ...] = ("1s", "1m")
    symbols: int = 2
    perpetuals: int = 0
    seconds: float = 120.0
    """Time until the faults end."""
    start: int = _EPOCH
    """UTC ms."""
    seconds_per_forecast: float = 0.001
    restarts: tuple[Restart, ...] = ()
    outages: tuple[tuple[float, float], ...] = ()
    """Times at which the sink is unavailable: start and end, in seconds."""

    @classmethod
    def from_seed(cls, seed: int) -> Self:
        """Scenario that depends on the seed alone: minutes of 1 s bars, or hours of 1 m bars."""
        random = Random(f"trial:{seed}")  # the text is part of what each seed means
        long = random.random() < 0.25
        seconds = 1_200.0 if long else 120.0
        times = sorted(random.uniform(0.02, 0.98) * seconds for _ in range(random.randrange(4)))
        restarts = tuple(
            Restart(round(at, 3), round(10 ** random.uniform(-1, 1.7), 3), random.random() < 0.7)
            for at in times
        )
        starts = [random.uniform(0, 0.8) * seconds for _ in range(random.randrange(3))]
        return cls(
            seed=seed,
            faults=replace(Faults.random(seed), until_seconds=seconds),
            timeframes=("1m", "5m") if long else ("1s", "1m"),
            symbols=2,
            perpetuals=1 if long else 0,
            seconds=seconds,
            start=_EPOCH + random.randrange(300_000),
            seconds_per_forecast=round(10 ** random.uniform(-3.5, -1.5), 5),
            restarts=restarts,
            outages=tuple((at, at + random.uniform(0.01, 0.2) * seconds) for at in starts),
        )

    def __str__(self) -> str:
        restarts = ", ".join(
            f"{'kill' if restart.killed else 'stop'} at {restart.at:g} s "
            f"for {restart.down_seconds:g} s"
            for restart in self.restarts
        )
        outages = ", ".join(f"{a:.0f}-{b:.0f} s" for a, b in self.outages)
        return (
            f"seed {self.seed}: {self.symbols} spot markets and {self.perpetuals} perpetuals in "
            f"{','.join(self.timeframes)} for {self.seconds:g} s from {self.start}\n"
            f"faults: {self.faults.dumps()}\nrestarts: {restarts or 'none'}\n"
            f"sink unavailable: {outages or 'never'}; "
            f"seconds per forecast: {self.seconds_per_forecast:g}"
        )


class ForecastCall(NamedTuple):
    """A window that the inference backend received."""

    run: int
    time: int
    """UTC ms, by the clock of the exchange."""
    window: Window


class HistoryRequest(NamedTuple):
    """A request for history, and the number of bars returned; None if it failed."""

    run: int
    time: int
    series: Series
    start: int
    end: int
    bars: int | None = None


@dataclass(slots=True)
class DaemonRun:
    """One run of the daemon."""

    started: int
    """UTC ms, by the daemon's clock."""
    initial_bars: dict[Series, list[Bar]]
    """Bars in the state file at its start."""
    shutdown_seconds: float = 0.0


@dataclass(slots=True, repr=False)
class RunLog:
    """Everything that happened in a chaos run."""

    scenario: Scenario
    series: tuple[Series, ...]
    runs: list[DaemonRun] = field(default_factory=list)
    forecasts: list[ForecastCall] = field(default_factory=list)
    history_requests: list[HistoryRequest] = field(default_factory=list)
    delivered: list[Record] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """Unexpected exceptions, logged errors, leftover tasks."""
    max_tasks: int = 0
    repaired_after: float | None = None
    """Seconds from the end of the faults until no bar was missing."""
    consistent_after: float | None = None
    """Seconds from the end of the faults until every bar was equal to the exchange's."""
    fault_counts: dict[str, int] = field(default_factory=dict)
    revisions: list[tuple[int, str]] = field(default_factory=list)
    """Changes of closed bars by the exchange: time, and symbol with timeframe."""
    truth: dict[Series, list[Bar]] = field(default_factory=dict)
    versions: dict[tuple[Series, int], list[Candle]] = field(default_factory=dict)
    """Versions of changed bars, by open time."""
    stored_bars: dict[Series, list[Bar]] = field(default_factory=dict)
    outcomes: dict[Series, list[Outcome]] = field(default_factory=dict)
    compared_until: int = 0
    """Close time of the newest bars compared, by the clock of the exchange."""


def selected_seeds(default: range) -> list[int]:
    """Seeds of the environment variable KRONOS_SEEDS, such as ``7,100-1099``, or ``default``."""
    chosen: list[int] = []
    for part in os.environ.get("KRONOS_SEEDS", "").split(","):
        first, _, last = part.strip().partition("-")
        if first:
            chosen += range(int(first), int(last or first) + 1)
    return chosen or list(default)
