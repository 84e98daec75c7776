"""Life cycle that all roles share: start, intake, orderly stop.

A role runs two groups of tasks. The outer one delivers records; the inner one takes bars in and
ends first, so that what was taken in can still be delivered. A task that fails ends the daemon.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from math import inf
from pathlib import Path
from random import Random
from typing import Any, Protocol

import structlog

from kronos_stream import __version__
from kronos_stream.daemon.config.settings import Settings
from kronos_stream.daemon.delivery.dead_letters import DeadLetterQueue
from kronos_stream.daemon.delivery.outbox import Outbox
from kronos_stream.daemon.roles import stall_checks
from kronos_stream.daemon.roles.forecasting import Forecasting
from kronos_stream.daemon.status.endpoints import Endpoints
from kronos_stream.daemon.status.series import SeriesStatusRegistry
from kronos_stream.daemon.status.server import StatusServer
from kronos_stream.daemon.status.watchdog import StallCheck, Watchdog
from kronos_stream.daemon.storage.state import State
from kronos_stream.daemon.telemetry.loop_lag import watch_loop_lag
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.errors import first_error
from kronos_stream.interfaces.sink import Sink
from kronos_stream.market.clock import Clock, SystemClock

_log = structlog.get_logger()

_START_TIMEOUT_SECONDS = 1_800.0
"""For the model, the venues and the bars in the state file."""


class CandleIntake(Protocol):
    """Source of a role's bars."""

    @property
    def series_count(self) -> int: ...

    def problems(self) -> Mapping[str, str]:
        """Parts of readiness → problem, empty if there is none."""

    def stall_checks(self) -> Iterable[StallCheck]: ...

    def running(self) -> AbstractAsyncContextManager[asyncio.Event]:
        """Take bars in inside this context. The event is set when no more will come."""

    async def reload(self) -> None:
        """Read the symbols file again."""

    async def close(self) -> None: ...


class Role(ABC):
    """The work of one process, from start to stop."""

    _intake: CandleIntake
    _forecasting: Forecasting | None = None

    def __init__(
        self,
        settings: Settings,
        sinks: Sequence[Sink],
        *,
        clock: Clock,
        random: Random,
        wall: Clock | None = None,
    ) -> None:
        """Open nothing yet.

        clock: time of the market. wall: time that records are stamped with.
        """
        self.settings = settings
        self.metrics = Metrics()
        self.metrics.build_info.labels(__version__, settings.role).set(1)
        self.ready = asyncio.Event()
        """Set while candles are followed."""
        self.running = asyncio.Event()
        """Set once the state file is open and tasks are supervised."""
        self.watchdog = Watchdog()
        self._sinks = list(sinks)
        self._clock, self._wall, self._random = clock, wall or SystemClock(), random
        self._series_status = SeriesStatusRegistry(clock)
        self._stop = asyncio.Event()
        self._state_file: Path | None = settings.state_file
        self._max_age_seconds = settings.outbox_max_age

    def stop(self) -> None:
        """Take in no more bars, finish and deliver the current batch, and end :meth:`run`."""
        self._stop.set()

    async def run(self) -> None:
        """Work until :meth:`stop`, or until the data end.

        Raises SettingsError, StateError, WorkerError, SinkRefused or LoginRefused for problems
        that the user can solve.
        """
        async with AsyncExitStack() as stack:
            self._state = await State.open(self._state_file)
            stack.push_async_callback(self._state.close)
            stack.push_async_callback(self._intake.close)
            if self._forecasting is not None:
                stack.push_async_callback(self._forecasting.worker.close)
            self._outbox = Outbox(
                self._state,
                self._sinks,
                self._wall,
                self._random,
                self.metrics,
                max_age_seconds=self._max_age_seconds,
                retry_login=self.settings.login_refused == "retry",
            )
            self._dead_letters = DeadLetterQueue(self._outbox, self._wall)
            pages = Endpoints(
                self.metrics,
                self.readiness,
                self._series_status,
                self._clock,
                stalled=self.watchdog.stalled,
                token=self.settings.http.token,
            )
            await stack.enter_async_context(StatusServer(self.settings.http, pages))
            try:
                async with asyncio.TaskGroup() as tasks:
                    delivery = tasks.create_task(self._outbox.run())
                    loop_lag = tasks.create_task(watch_loop_lag(self.metrics))
                    self.watchdog.set_checks(
                        stall_checks.startup(_START_TIMEOUT_SECONDS),
                        stall_checks.delivery(self._outbox.queues.items()),
                    )
                    self.running.set()
                    if await self._run_until_stopped(self._start()):
                        await self._work()
                    delivery.cancel()
                    loop_lag.cancel()
            except* Exception as errors:  # noqa: BLE001 - any error ends the daemon
                raise first_error(errors) from None

    def readiness(self) -> dict[str, str]:
        """Parts of the daemon → problem that keeps it from being ready, empty if there is none."""
        found = {} if self._forecasting is None else {"worker": self._forecasting.worker.problem()}
        found |= {f"sink {name}": why for name, why in self._outbox.problems().items()}
        if not self.ready.is_set():
            found["start"] = "candles are not followed yet"
        return found | dict(self._intake.problems())

    @property
    def series_count(self) -> int:
        """Number of followed series."""
        return self._intake.series_count

    async def reload(self) -> None:
        """Follow the series of the present symbols file, once :attr:`ready`.

        Raises SettingsError or SourceError where nothing was changed.
        """
        await self._intake.reload()

    async def drain(self) -> None:
        """Return once all bars taken in are worked off and delivered; timers may be open."""
        if self._forecasting is not None:
            await self._forecasting.scheduler.drain()
        await self._outbox.drain(inf)

    @abstractmethod
    async def _start(self) -> None:
        """Load the model and the state, check the symbols, and connect the parts."""

    def _tasks(self) -> Iterable[Coroutine[Any, Any, None]]:
        """Tasks that run from the start until everything is delivered."""
        yield self._dead_letters.run()
        if self._forecasting is not None:
            yield self._forecasting.worker.run()
            yield self._forecasting.scheduler.run()

    def _stall_checks(self) -> Iterable[StallCheck]:
        yield from self._intake.stall_checks()
        yield from stall_checks.delivery(self._outbox.queues.items())
        if self._forecasting is not None:
            yield from self._forecasting.stall_checks()

    async def _work(self) -> None:
        """Take bars in until the stop or the end of the data, then finish and deliver."""
        async with asyncio.TaskGroup() as tasks:
            helpers = [tasks.create_task(work) for work in self._tasks()]
            async with self._intake.running() as ended:
                self.watchdog.set_checks(self._stall_checks())
                self.ready.set()
                await self._run_until_stopped(ended.wait())
                self.ready.clear()
                if not self._stop.is_set():
                    await self._run_until_stopped(self.drain())
                stop_began = asyncio.get_running_loop().time()
            await self._finish(stop_began)
            for task in helpers:
                task.cancel()

    async def _finish(self, stop_began: float) -> None:
        """Finish the current batch and deliver what is in the outbox, within the grace period.

        stop_began: loop time.
        """
        grace, finished = self.settings.stop_grace, True
        if self._forecasting is not None:
            finished = await self._forecasting.scheduler.finish(grace)
        await self._dead_letters.flush()
        left = grace - (asyncio.get_running_loop().time() - stop_began)
        undelivered = await self._outbox.drain(max(0.0, left))
        _log.info("stopped", batch_finished=finished, undelivered=undelivered)

    async def _run_until_stopped(self, work: Coroutine[Any, Any, Any]) -> bool:
        """Run ``work``; cancel it and return False if the stop comes first."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
                return True
            return False
        finally:
            for future in (task, stop):
                future.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)
