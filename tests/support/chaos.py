"""Chaos runs: the whole daemon against an exchange with faults, in virtual time.

Everything is real and in this process, sockets included, except for both ends: a fake worker
replaces the model and records its windows, and a fake sink records deliveries. The daemon is
killed and restarted as the scenario defines, on one state file, with ``CATCH_UP=all``. After a
while the faults end, and the daemon must repair their consequences soon;
:mod:`tests.support.chaos_checks` then compares its state with the exchange's true bars.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from kronos_stream.daemon.config.settings import Settings
from kronos_stream.daemon.requests import ForecastRequest
from kronos_stream.daemon.roles.standalone import StandaloneRole
from kronos_stream.daemon.storage.state import State
from kronos_stream.interfaces import plugins
from kronos_stream.interfaces.source import Source
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.clock import LoopClock
from kronos_stream.market.series import Series
from kronos_stream.testing.exchange import SimulatedExchange
from kronos_stream.testing.virtual_time import run_virtual
from tests.support.chaos_doubles import (
    ErrorLogHandler,
    RecordingSink,
    RecordingSource,
    RecordingWorker,
)
from tests.support.chaos_scenario import DaemonRun, RunLog, Scenario

LOOKBACK = 32
REPAIR_SECONDS = 180.0
"""Seconds after the end of all faults, after which no bar may be missing or synthetic."""

CONSISTENCY_SECONDS = 1_000.0
"""Seconds after it until every bar equals the exchange's, even if its last push was lost."""

SETTLE_MS = 10_000
"""Age below which bars are not compared; the exchange's clock may be wrong by 5 s."""

_POLL_SECONDS = 5.0
_KILL_SECONDS = 30.0
_HISTORY = 40
_ALL_BARS = 1_000_000


def _binance_options(exchange: SimulatedExchange) -> Any:
    return plugins.load_source("binance")[1].options(
        ws_url=exchange.ws_url,
        rest_url=exchange.rest_url,
        futures_ws_url=f"{exchange.ws_url}/market",
        futures_rest_url=exchange.rest_url,
    )


@dataclass(frozen=True, slots=True)
class ConnectorSetup:
    """Connector through which the daemon reads the exchange."""

    venue: str = "binance"
    options: Callable[[SimulatedExchange], Any] = _binance_options
    """Options that connect to an exchange."""
    has_amounts: bool = True
    """True if its candles have amounts."""

    def visible(self, candle: Candle) -> Candle:
        """Candle of the exchange as this connector delivers it."""
        return candle if self.has_amounts else candle._replace(amount=None)


BINANCE = ConnectorSetup()


def run_chaos(
    scenario: Scenario,
    folder: Path,
    *,
    wrap_source: Callable[[Source], Source] = lambda source: source,
    connector: ConnectorSetup = BINANCE,
) -> RunLog:
    """Run ``scenario`` with its files in ``folder``. wrap_source: wraps each source."""
    log = run_virtual(_ChaosRun(scenario, folder, wrap_source, connector).run())
    gc.collect()  # asyncio reports unretrieved exceptions when it deletes their tasks
    return log


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
        """Bars that the exchange has changed, and the daemon has not."""

    async def run(self) -> RunLog:
        scenario = self._scenario
        self._clock = LoopClock(scenario.start)
        self._exchange = SimulatedExchange(
            scenario.symbols,
            perpetuals=scenario.perpetuals,
            timeframes=scenario.timeframes,
            seed=scenario.seed,
            faults=scenario.faults,
            history=_HISTORY,
            keep=20_000,
            clock=self._clock,
        )
        log: RunLog | None = None
        async with self._exchange as exchange:
            self._settings = self._make_settings()
            log = self._log = RunLog(scenario, self._settings.series())
            with self._capture_errors():
                await self._run_daemons()
                log.fault_counts = dict(exchange.fault_injector.counts)
                log.revisions = [
                    (incident.moment, incident.subject)
                    for incident in exchange.fault_injector.incidents
                    if incident.kind == "revised"
                ]
        await asyncio.sleep(60)  # time for tasks to end
        leftover = asyncio.all_tasks() - {asyncio.current_task()}
        log.errors += [f"leftover task: {task!r}" for task in leftover]
        return log

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

    async def _run_daemons(self) -> None:
        scenario, loop = self._scenario, asyncio.get_running_loop()
        for restart in scenario.restarts:
            daemon, running = await self._start_daemon()
            left = max(0.05, restart.at - loop.time())
            await asyncio.wait((running,), timeout=left)
            await self._stop_daemon(daemon, running, killed=restart.killed)
            await asyncio.sleep(restart.down_seconds)
        daemon, running = await self._start_daemon()
        await asyncio.wait((running,), timeout=max(0.0, scenario.seconds - loop.time()))
        await self._wait_until_repaired(daemon, running)
        if self._log.repaired_after is not None:
            await self._compare_contexts(daemon)
        await self._stop_daemon(daemon, running, killed=False)
        await self._collect_results()

    async def _start_daemon(self) -> tuple[StandaloneRole, asyncio.Task[None]]:
        log, number = self._log, len(self._log.runs)
        state = await State.open(self._state_file)
        bars = {series: await state.load(series, _ALL_BARS) for series in log.series}
        await state.close()
        log.runs.append(DaemonRun(self._clock.now(), bars))
        seed = f"{self._scenario.seed}:{number}"
        venue = self._connector.venue
        name, connector = plugins.load_source(venue)
        options = self._settings.options[name]
        built = connector.build(venue, options, self._clock, Random(f"source:{seed}"))
        source = RecordingSource(self._wrap_source(built), number, self._exchange, log)
        worker = RecordingWorker(number, self._exchange, self._scenario.seconds_per_forecast, log)
        daemon = StandaloneRole(
            self._settings,
            {venue: source},
            [RecordingSink(self._scenario, log)],
            clock=self._clock,
            wall=self._clock,
            random=Random(f"daemon:{seed}"),
            worker_factory=lambda _config, _metrics: worker,
        )
        return daemon, asyncio.create_task(daemon.run(), name="daemon")

    async def _stop_daemon(
        self, daemon: StandaloneRole, running: asyncio.Task[None], *, killed: bool
    ) -> None:
        loop = asyncio.get_running_loop()
        stopped_at = loop.time()
        if running.done():
            self._log.errors.append("the daemon ended unexpectedly")
        elif killed:
            running.cancel()
        else:
            daemon.stop()
        await asyncio.wait((running,), timeout=_KILL_SECONDS)
        self._log.runs[-1].shutdown_seconds = loop.time() - stopped_at
        if not running.done():
            self._log.errors.append(f"the daemon did not end in {_KILL_SECONDS:g} s")
        elif not running.cancelled() and (error := running.exception()) is not None:
            self._log.errors.append(f"the daemon failed: {error!r}")

    async def _wait_until_repaired(
        self, daemon: StandaloneRole, running: asyncio.Task[None]
    ) -> None:
        """Wait until the daemon has the exchange's bars, or its time is up."""
        loop, log, ended = asyncio.get_running_loop(), self._log, self._scenario.seconds
        while not running.done():
            since = loop.time() - ended
            complete, equal = await self._compare(daemon)
            if complete and log.repaired_after is None:
                log.repaired_after = max(0.0, since)
            if equal or since > (
                REPAIR_SECONDS if log.repaired_after is None else CONSISTENCY_SECONDS
            ):
                log.consistent_after = max(0.0, since) if equal else None
                return
            await asyncio.sleep(_POLL_SECONDS)

    async def _compare(self, daemon: StandaloneRole) -> tuple[bool, bool]:
        """Return whether no bar is missing and all are forecast, and whether all bars are equal."""
        if not daemon.ready.is_set():
            return False, False
        until = self._log.compared_until = self._exchange.clock.now() - SETTLE_MS
        changed = set()
        for series in self._log.series:
            bars = {bar.candle.time: bar for bar in await daemon._state.load(series, _ALL_BARS)}
            first = min(bars, default=0)
            changed |= {
                (stale_series, opened)
                for stale_series, opened in self._stale_bars
                if stale_series == series and opened < first
            }  # the daemon no longer stores them
            for true in self._exchange.truth(series, first):
                opened = true.candle.time
                if series.timeframe.after(opened) > until:
                    break
                ours = bars.get(opened)
                if ours is None or ours.synthetic != true.synthetic:
                    return False, False
                if not true.synthetic and ours.candle != self._connector.visible(true.candle):
                    changed.add((series, opened))
        self._stale_bars = changed
        complete = daemon._forecasting.scheduler.pending == 0
        return complete, complete and not changed

    async def _compare_contexts(self, daemon: StandaloneRole) -> None:
        for series in self._log.series:
            bars = await daemon._state.load(series, LOOKBACK)
            newest = bars[-1]
            opened = newest.candle.time
            close = series.timeframe.after(opened)
            due = ForecastRequest(series, opened, newest.revision, close, newest.received)
            window = await daemon._intake.saved_bars.window(due)
            if window is None or not np.array_equal(window.values, context_rows(bars)):
                self._log.errors.append(f"{series}: the context differs from the stored bars")

    async def _collect_results(self) -> None:
        """Collect all that is checked later, before exchange and state file are closed."""
        log, exchange = self._log, self._exchange
        state = await State.open(self._state_file)
        for series in log.series:
            visible = self._connector.visible
            truth = [bar._replace(candle=visible(bar.candle)) for bar in exchange.truth(series)]
            log.truth[series] = truth
            for bar in truth:
                if bar.revision:
                    opened = bar.candle.time
                    versions = exchange.versions(series, opened)
                    log.versions[series, opened] = list(map(visible, versions))
            log.stored_bars[series] = await state.load(series, _ALL_BARS)
            log.outcomes[series] = await state.outcomes(series, 0)
        await state.close()

    @contextmanager
    def _capture_errors(self) -> Iterator[None]:
        """Collect errors that raise nothing, and count tasks."""
        log, loop = self._log, asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: log.errors.append(f"event loop: {context}"))
        handler = ErrorLogHandler(log.errors)
        logging.getLogger().addHandler(handler)
        counting = asyncio.create_task(self._count_tasks())
        try:
            with structlog.testing.capture_logs() as logs:
                yield
            log.errors += [f"log: {entry}" for entry in logs if entry["log_level"] == "error"]
        finally:
            counting.cancel()
            logging.getLogger().removeHandler(handler)

    async def _count_tasks(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._log.max_tasks = max(self._log.max_tasks, len(asyncio.all_tasks()))


def context_rows(bars: Sequence[Bar]) -> NDArray[np.float32]:
    """Bars as rows of a context: (L, 6), or (L, 5) without amounts."""
    columns = 7 if all(bar.candle.amount is not None for bar in bars) else 6
    return np.array([bar.candle[1:columns] for bar in bars], np.float32)
