"""A trial: the whole daemon against an exchange that fails by its seed, in virtual time.

Everything is real and in this process, sockets included, but for the two ends that a trial is not
about: in place of the model stands a forecaster that keeps what it is given, and the sink keeps
what is delivered. The daemon is killed and started again as the seed says, on one state file, with
``CATCH_UP=all``. Faults end after a while, and what they have done must be mended soon after;
:mod:`tests.support.chaos_checks` then compares what is there with the exchange's truth.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Self

import numpy as np
import structlog
from numpy.typing import NDArray

from kronos_stream.bars.window import Window
from kronos_stream.daemon.config.settings import Settings
from kronos_stream.daemon.inference.backend import BatchResult
from kronos_stream.daemon.requests import ForecastRequest, Outcome
from kronos_stream.daemon.roles.standalone import StandaloneRole
from kronos_stream.daemon.storage.state import State
from kronos_stream.interfaces import plugins
from kronos_stream.interfaces.sink import Record, Refusal, SinkUnavailable
from kronos_stream.interfaces.source import Source, SourceCallbacks
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.clock import LoopClock
from kronos_stream.market.series import Series
from kronos_stream.testing.exchange import Faults, SimulatedExchange
from kronos_stream.testing.virtual_time import run_virtual
from tests.support.fake_worker import FakeWorker

LOOKBACK = 32
REPAIR_SECONDS = 180.0
"""So long after the end of all faults no bar may be missing, nor made up."""

CONSISTENCY_SECONDS = 1_000.0
"""So long after it every bar is as the venue has it, even if nobody heard of its last change."""

SETTLE_MS = 10_000
"""Bars younger than this are not looked for yet; the venue's clock may be 5 s off."""

_EPOCH = 1_750_000_000_000
_POLL_SECONDS = 5.0
_KILL_SECONDS = 30.0
_HISTORY = 40
_ALL_BARS = 1_000_000


class Restart(NamedTuple):
    """An end of the daemon, ``at`` seconds from the start, and ``down`` seconds until the next."""

    at: float
    down_seconds: float
    killed: bool
    """Cancelled wherever it is; otherwise told to stop."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What happens in a trial."""

    seed: int
    faults: Faults
    timeframes: tuple[str, ...] = ("1s", "1m")
    symbols: int = 2
    perpetuals: int = 0
    seconds: float = 120.0
    """Until the faults end."""
    start: int = _EPOCH
    """UTC ms."""
    seconds_per_forecast: float = 0.001
    """Seconds that a forecast takes."""
    restarts: tuple[Restart, ...] = ()
    outages: tuple[tuple[float, float], ...] = ()
    """When the sink does not deliver: from, until, in seconds."""

    @classmethod
    def from_seed(cls, seed: int) -> Self:
        """What the seed alone decides: minutes of seconds, or hours of minutes."""
        random = Random(f"trial:{seed}")
        long = random.random() < 0.25
        seconds = 1_200.0 if long else 120.0
        moments = sorted(random.uniform(0.02, 0.98) * seconds for _ in range(random.randrange(4)))
        restarts = tuple(
            Restart(round(at, 3), round(10 ** random.uniform(-1, 1.7), 3), random.random() < 0.7)
            for at in moments
        )
        begins = [random.uniform(0, 0.8) * seconds for _ in range(random.randrange(3))]
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
            outages=tuple((at, at + random.uniform(0.01, 0.2) * seconds) for at in begins),
        )

    def __str__(self) -> str:
        restarts = ", ".join(
            f"{'kill' if one.killed else 'stop'} at {one.at:g} s for {one.down_seconds:g} s"
            for one in self.restarts
        )
        outages = ", ".join(f"{a:.0f}-{b:.0f} s" for a, b in self.outages)
        return (
            f"seed {self.seed}: {self.symbols} spot markets and {self.perpetuals} perpetuals in "
            f"{','.join(self.timeframes)} for {self.seconds:g} s from {self.start}\n"
            f"faults: {self.faults.dumps()}\nrestarts: {restarts or 'none'}\n"
            f"the sink is away: {outages or 'never'}; a forecast takes {self.seconds_per_forecast:g} s"
        )


def _binance_options(exchange: SimulatedExchange) -> Any:
    return plugins.load_source("binance")[1].options(
        ws_url=exchange.ws_url,
        rest_url=exchange.rest_url,
        futures_ws_url=f"{exchange.ws_url}/market",
        futures_rest_url=exchange.rest_url,
    )


@dataclass(frozen=True, slots=True)
class ConnectorSetup:
    """Which connector stands between the daemon and the exchange."""

    venue: str = "binance"
    options: Callable[[SimulatedExchange], Any] = _binance_options
    """What the connector is told, so that it finds the exchange."""
    has_amounts: bool = True
    """Whether it tells amounts."""

    def visible(self, candle: Candle) -> Candle:
        """A candle of the exchange's as the daemon can know it."""
        return candle if self.has_amounts else candle._replace(amount=None)


class ForecastCall(NamedTuple):
    """What the forecaster was given."""

    run: int
    time: int
    """UTC ms by the exchange's clock."""
    window: Window


class HistoryRequest(NamedTuple):
    """What the source was asked for, and how many bars it answered with; None if it failed."""

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
    """UTC ms by the daemon's clock."""
    initial_bars: dict[Series, list[Bar]]
    """What the state file held then."""
    shutdown_seconds: float = 0.0


@dataclass(slots=True, repr=False)
class RunLog:
    """All that happened."""

    scenario: Scenario
    series: tuple[Series, ...]
    runs: list[DaemonRun] = field(default_factory=list)
    forecasts: list[ForecastCall] = field(default_factory=list)
    history_requests: list[HistoryRequest] = field(default_factory=list)
    delivered: list[Record] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """Exceptions that nobody expected, errors logged, tasks left."""
    max_tasks: int = 0
    repaired_after: float | None = None
    """Seconds after the faults' end until all was mended."""
    consistent_after: float | None = None
    """Seconds after it until every bar was equal."""
    fault_counts: dict[str, int] = field(default_factory=dict)
    revisions: list[tuple[int, str]] = field(default_factory=list)
    """When the venue changed a closed bar, and of which symbol and timeframe."""
    truth: dict[Series, list[Bar]] = field(default_factory=dict)
    versions: dict[tuple[Series, int], list[Candle]] = field(default_factory=dict)
    """All that changed bars have been, by open."""
    stored_bars: dict[Series, list[Bar]] = field(default_factory=dict)
    outcomes: dict[Series, list[Outcome]] = field(default_factory=dict)
    compared_until: int = 0
    """Bars closed by then, by the exchange's clock, were looked for last."""


def run_chaos(
    scenario: Scenario,
    folder: Path,
    *,
    wrap_source: Callable[[Source], Source] = lambda source: source,
    connector: ConnectorSetup = ConnectorSetup(),
) -> RunLog:
    """Play ``script`` with its files in ``folder``. wrap: puts something around each source."""
    journal = run_virtual(_ChaosRun(scenario, folder, wrap_source, connector).run())
    gc.collect()  # a task's exception that nobody asked for is told when the task goes
    return journal


class _ChaosRun:
    def __init__(
        self,
        scenario: Scenario,
        folder: Path,
        wrap: Callable[[Source], Source],
        connector: ConnectorSetup,
    ) -> None:
        self._scenario, self._wrap_source, self._connector = scenario, wrap, connector
        self._state_file = folder / "state.sqlite"
        self._stale_bars: set[tuple[Series, int]] = set()
        """Bars that the venue has changed, and the daemon does not know it."""

    async def run(self) -> RunLog:
        script = self._scenario
        self._clock = LoopClock(script.start)
        self._exchange = SimulatedExchange(
            script.symbols,
            perpetuals=script.perpetuals,
            timeframes=script.timeframes,
            seed=script.seed,
            faults=script.faults,
            history=_HISTORY,
            keep=20_000,
            clock=self._clock,
        )
        journal: RunLog | None = None
        async with self._exchange as exchange:
            self._settings = self._make_settings()
            journal = self._log = RunLog(script, self._settings.series())
            with self._capture_errors():
                await self._run_scenario()
                journal.fault_counts = dict(exchange.fault_injector.counts)
                journal.revisions = [
                    (one.moment, one.subject)
                    for one in exchange.fault_injector.incidents
                    if one.kind == "revised"
                ]
        await asyncio.sleep(60)  # whatever still runs has had its chance to end
        left = asyncio.all_tasks() - {asyncio.current_task()}
        journal.errors += [f"a task is left: {task!r}" for task in left]
        return journal

    def _make_settings(self) -> Settings:
        venue = self._connector.venue
        connector, _ = plugins.load_source(venue)
        return Settings.model_validate(
            {
                "symbols": tuple(f"{venue}:{symbol}" for symbol in self._exchange.symbols),
                "timeframes": self._scenario.timeframes,
                "lookback": LOOKBACK,
                "horizon": 1,
                "paths": 1,
                "quantiles": (0.5,),
                "catch_up": "all",
                "state_file": self._state_file,
                "http": {"port": 0},
                "options": {connector: self._connector.options(self._exchange)},
            }
        )

    # -- the play ----------------------------------------------------------------------------

    async def _run_scenario(self) -> None:
        script, loop = self._scenario, asyncio.get_running_loop()
        for restart in script.restarts:
            daemon, running = await self._start_daemon()
            left = max(0.05, restart.at - loop.time())
            await asyncio.wait((running,), timeout=left)
            await self._stop_daemon(daemon, running, killed=restart.killed)
            await asyncio.sleep(restart.down_seconds)
        daemon, running = await self._start_daemon()
        await asyncio.wait((running,), timeout=max(0.0, script.seconds - loop.time()))
        await self._wait_until_repaired(daemon, running)
        if self._log.repaired_after is not None:
            await self._compare_contexts(daemon)
        await self._stop_daemon(daemon, running, killed=False)
        await self._collect_results()

    async def _start_daemon(self) -> tuple[StandaloneRole, asyncio.Task[None]]:
        journal, life = self._log, len(self._log.runs)
        state = await State.open(self._state_file)
        tapes = {one: await state.load(one, _ALL_BARS) for one in journal.series}
        await state.close()
        journal.runs.append(DaemonRun(self._clock.now(), tapes))
        chance = f"{self._scenario.seed}:{life}"
        venue = self._connector.venue
        name, connector = plugins.load_source(venue)
        options = self._settings.options[name]
        made = connector.build(venue, options, self._clock, Random(f"source:{chance}"))
        source = _RecordingSource(self._wrap_source(made), life, self._exchange, journal)
        forecaster = _RecordingWorker(
            life, self._exchange, self._scenario.seconds_per_forecast, journal
        )
        daemon = StandaloneRole(
            self._settings,
            {venue: source},
            [_RecordingSink(self._scenario, journal)],
            clock=self._clock,
            wall=self._clock,
            random=Random(f"daemon:{chance}"),
            worker_factory=lambda _plan, _metrics: forecaster,
        )
        return daemon, asyncio.create_task(daemon.run(), name="daemon")

    async def _stop_daemon(
        self, daemon: StandaloneRole, running: asyncio.Task[None], *, killed: bool
    ) -> None:
        loop, life = asyncio.get_running_loop(), self._log.runs[-1]
        began = loop.time()
        if running.done():
            self._log.errors.append("the daemon ended by itself")
        elif killed:
            running.cancel()
        else:
            daemon.stop()
        await asyncio.wait((running,), timeout=_KILL_SECONDS)
        life.shutdown_seconds = loop.time() - began
        if not running.done():
            self._log.errors.append(f"the daemon did not end in {_KILL_SECONDS:g} s")
        elif not running.cancelled() and (error := running.exception()) is not None:
            self._log.errors.append(f"the daemon failed: {error!r}")

    async def _wait_until_repaired(
        self, daemon: StandaloneRole, running: asyncio.Task[None]
    ) -> None:
        """Wait until the daemon has what the exchange has, within bounds."""
        loop, journal, ended = asyncio.get_running_loop(), self._log, self._scenario.seconds
        while not running.done():
            since = loop.time() - ended
            whole, equal = await self._compare(daemon)
            if whole and journal.repaired_after is None:
                journal.repaired_after = max(0.0, since)
            if equal or since > (
                REPAIR_SECONDS if journal.repaired_after is None else CONSISTENCY_SECONDS
            ):
                journal.consistent_after = max(0.0, since) if equal else None
                return
            await asyncio.sleep(_POLL_SECONDS)

    async def _compare(self, daemon: StandaloneRole) -> tuple[bool, bool]:
        """Whether no bar is missing or made up and all is forecast; and whether all are equal."""
        if not daemon.ready.is_set():
            return False, False
        until = self._log.compared_until = self._exchange.clock.now() - SETTLE_MS
        changed = set()
        for series in self._log.series:
            tape = {bar.candle.time: bar for bar in await daemon._state.load(series, _ALL_BARS)}
            first = min(tape, default=0)
            changed |= {
                (one, opened)
                for one, opened in self._stale_bars
                if one == series and opened < first
            }  # the daemon has forgotten them
            for true in self._exchange.truth(series, first):
                opened = true.candle.time
                if series.timeframe.after(opened) > until:
                    break
                ours = tape.get(opened)
                if ours is None or ours.synthetic != true.synthetic:
                    return False, False
                if not true.synthetic and ours.candle != self._connector.visible(true.candle):
                    changed.add((series, opened))
        self._stale_bars = changed
        whole = daemon._forecasting.scheduler.pending == 0
        return whole, whole and not changed

    async def _compare_contexts(self, daemon: StandaloneRole) -> None:
        for series in self._log.series:
            bars = await daemon._state.load(series, LOOKBACK)
            newest = bars[-1]
            opened = newest.candle.time
            close = series.timeframe.after(opened)
            due = ForecastRequest(series, opened, newest.revision, close, newest.received)
            window = await daemon._intake.saved_bars.window(due)
            if window is None or not np.array_equal(window.values, context_rows(bars)):
                self._log.errors.append(f"{series}: the context is not the tape")

    async def _collect_results(self) -> None:
        """Keep what the verdict is about, before exchange and state file are gone."""
        journal, exchange = self._log, self._exchange
        state = await State.open(self._state_file)
        for series in journal.series:
            heard = self._connector.visible
            truth = [bar._replace(candle=heard(bar.candle)) for bar in exchange.truth(series)]
            journal.truth[series] = truth
            for bar in truth:
                if bar.revision:
                    opened = bar.candle.time
                    versions = exchange.versions(series, opened)
                    journal.versions[series, opened] = list(map(heard, versions))
            journal.stored_bars[series] = await state.load(series, _ALL_BARS)
            journal.outcomes[series] = await state.outcomes(series, 0)
        await state.close()

    # -- what must not happen ------------------------------------------------------------------

    @contextmanager
    def _capture_errors(self) -> Iterator[None]:
        """Keep what goes wrong unseen, and how much is under way."""
        journal, loop = self._log, asyncio.get_running_loop()
        loop.set_exception_handler(
            lambda _, context: journal.errors.append(f"event loop: {context}")
        )
        handler = _ErrorLogHandler(journal.errors)
        logging.getLogger().addHandler(handler)
        counting = asyncio.create_task(self._count_tasks())
        try:
            with structlog.testing.capture_logs() as logs:
                yield
            journal.errors += [f"log: {one}" for one in logs if one["log_level"] == "error"]
        finally:
            counting.cancel()
            logging.getLogger().removeHandler(handler)

    async def _count_tasks(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._log.max_tasks = max(self._log.max_tasks, len(asyncio.all_tasks()))


class _ErrorLogHandler(logging.Handler):
    """Keeps what libraries log as an error: aiohttp tells so of a handler that has failed."""

    def __init__(self, troubles: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._errors = troubles

    def emit(self, record: logging.LogRecord) -> None:
        self._errors.append(f"{record.name}: {self.format(record)}")


class _RecordingSource:
    """A source, and what it is asked for."""

    def __init__(
        self, source: Source, life: int, exchange: SimulatedExchange, journal: RunLog
    ) -> None:
        self._source, self._run, self._exchange = source, life, exchange
        self._log = journal
        self.venue, self.traits = source.venue, source.traits

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:
        return await self._source.unsupported(series)

    def subscribe(self, series: Collection[Series]) -> None:
        self._source.subscribe(series)

    async def run(self, callbacks: SourceCallbacks) -> None:
        await self._source.run(callbacks)

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        asked = HistoryRequest(self._run, self._exchange.clock.now(), series, start, end)
        try:
            candles = await self._source.history(series, start, end)
            asked = asked._replace(bars=len(candles))
            return candles
        finally:
            self._log.history_requests.append(asked)

    async def close(self) -> None:
        await self._source.close()


class _RecordingWorker(FakeWorker):
    """Keeps what it is given."""

    def __init__(
        self, life: int, exchange: SimulatedExchange, pace: float, journal: RunLog
    ) -> None:
        super().__init__(pace)
        self._run, self._exchange, self._log = life, exchange, journal

    async def forecast(self, windows: Sequence[Window], deadline: float) -> BatchResult:
        moment = self._exchange.clock.now()
        self._log.forecasts += [ForecastCall(self._run, moment, window) for window in windows]
        return await super().forecast(windows, deadline)


class _RecordingSink:
    """A sink that keeps what it is given; away at times, in the middle of a delivery, too."""

    name = "recorder"

    def __init__(self, script: Scenario, journal: RunLog) -> None:
        self._scenario, self._log = script, journal
        self._random = Random(f"sink:{script.seed}:{len(journal.runs)}")

    async def start(self) -> None:
        self._check()

    async def deliver(self, records: Sequence[Record]) -> Sequence[Refusal]:
        try:
            self._check()
        except SinkUnavailable:
            self._log.delivered += records[: self._random.randrange(len(records) + 1)]
            raise
        self._log.delivered += records
        return []

    async def close(self) -> None:
        await asyncio.sleep(0)

    def _check(self) -> None:
        now = asyncio.get_running_loop().time()
        if any(begins <= now < ends for begins, ends in self._scenario.outages):
            raise SinkUnavailable("away, as the script says")


def context_rows(bars: Sequence[Bar]) -> NDArray[np.float32]:
    """(L, 6): bars as a context holds them; (L, 5) where amounts are not told."""
    columns = 7 if all(bar.candle.amount is not None for bar in bars) else 6
    return np.array([bar.candle[1:columns] for bar in bars], np.float32)
