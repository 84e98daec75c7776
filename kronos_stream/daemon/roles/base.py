"""What all roles of the daemon have: state, outbox and sinks, pages, and a way to stop.

A role runs two groups of tasks. The outer one, here, delivers what is due; the inner one, each
role's own, takes candles in and ends first, so that what has been taken in can still be sent. A
task that fails takes the daemon down, loudly.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from random import Random
from typing import Any

import structlog

from kronos_stream import __version__
from kronos_stream.daemon.config.settings import Settings
from kronos_stream.daemon.delivery.outbox import Outbox
from kronos_stream.daemon.delivery.publisher import refusal_dead_letter
from kronos_stream.daemon.status import watchdog
from kronos_stream.daemon.status.endpoints import Endpoints
from kronos_stream.daemon.status.series import SeriesStatusRegistry
from kronos_stream.daemon.status.server import StatusServer
from kronos_stream.daemon.storage.state import State
from kronos_stream.daemon.telemetry.loop_lag import watch_loop_lag
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.sink import Sink
from kronos_stream.market.clock import Clock, SystemClock

_log = structlog.get_logger()

_START_TIMEOUT_SECONDS = 1_800.0
"""For the model, the venues and the bars in the state file."""


class Role(ABC):
    """One process's work, from start to stop; see :meth:`_open`, :meth:`_work`."""

    def __init__(
        self,
        settings: Settings,
        sinks: Sequence[Sink],
        *,
        clock: Clock,
        random: Random,
        wall: Clock | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """Nothing is opened yet.

        clock: the market's time. wall: what records are stamped with.
        """
        self.settings = settings
        self.metrics = metrics or Metrics()
        self.metrics.build_info.labels(__version__, settings.role).set(1)
        self.ready = asyncio.Event()
        """Set once all is loaded and candles are followed."""
        self.running = asyncio.Event()
        """Set once the state is ours and tasks are supervised, whoever may be away."""
        self.watchdog = watchdog.Watchdog()
        self._sinks = list(sinks)
        self._clock, self._wall, self._random = clock, wall or SystemClock(), random
        self._series_status = SeriesStatusRegistry(clock)
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Take in no more, finish what is in hand, deliver, and let :meth:`run` return."""
        self._stop.set()

    async def run(self) -> None:
        """Work until :meth:`stop`, or until there is nothing left to take in.

        Raises SettingsError, StateError, WorkerError, SinkRefused or LoginRefused for what the user
        can mend.
        """
        settings = self.settings
        async with AsyncExitStack() as stack:
            self._state = await self._open(stack)
            self._outbox = Outbox(
                self._state,
                self._sinks,
                self._wall,
                self._random,
                self.metrics,
                max_age_seconds=self._max_age,
                make_dead_letter=lambda sink, refusal: refusal_dead_letter(
                    sink, refusal, self._wall.now()
                ),
                retry_login=settings.login_refused == "retry",
            )
            pages = Endpoints(
                self.metrics,
                self.readiness,
                self._series_status,
                self._clock,
                stalled=self.watchdog.stalled,
                token=settings.http.token,
            )
            await stack.enter_async_context(StatusServer(settings.http, pages))
            try:
                async with asyncio.TaskGroup() as tasks:
                    beside = [
                        tasks.create_task(work)
                        for work in (
                            self._outbox.run(),
                            watch_loop_lag(self.metrics),
                            *self._background_tasks(),
                        )
                    ]
                    self.watchdog.set_checks(
                        watchdog.startup_checks(_START_TIMEOUT_SECONDS),
                        watchdog.delivery_checks(self._outbox.queues.items()),
                    )
                    self.running.set()
                    await self._work()
                    for task in beside:
                        task.cancel()
            except* Exception as failures:  # noqa: BLE001 - whatever it was, it ends the daemon
                raise _first_error(failures) from None

    def readiness(self) -> dict[str, str]:
        """What readiness hangs on: what it is → why it is not so, empty if it is."""
        found = {f"sink {name}": why for name, why in self._outbox.problems().items()}
        if not self.ready.is_set():
            found["start"] = "candles are not followed yet"
        return found

    @property
    @abstractmethod
    def series_count(self) -> int:
        """How many series."""

    async def reload(self) -> None:
        """Read again what may be read again, if anything."""
        _log.info("this role has nothing to read again", role=self.settings.role)

    @property
    def _max_age(self) -> float:
        """Seconds after which an undelivered record is given up."""
        return self.settings.outbox_max_age

    @abstractmethod
    async def _open(self, stack: AsyncExitStack) -> State:
        """What outlives all tasks, given to ``stack`` to be closed; returns the state."""

    @abstractmethod
    async def _work(self) -> None:
        """Take in, and hand over to the outbox, until told to stop; then :meth:`_deliver`."""

    def _background_tasks(self) -> Sequence[Coroutine[Any, Any, None]]:
        """What else runs until the end."""
        return ()

    async def _drain_outbox(self, stop_began: float, *, batch_finished: bool) -> None:
        """Deliver what is in the outbox, within what is left of the grace.

        began: loop time at which the stop began. whole: whether the work in hand was finished.
        """
        left = self.settings.stop_grace - (asyncio.get_running_loop().time() - stop_began)
        waiting = await self._outbox.drain(max(0.0, left))
        _log.info("stopped", batch_finished=batch_finished, undelivered=waiting)

    async def _run_until_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Run ``work``; given up, and False, when told to stop before it is done."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
                return True
            return False
        finally:
            await _cancel_all(task, stop)


async def _cancel_all(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _first_error(failures: BaseExceptionGroup[Exception]) -> Exception:
    """What failed first: the groups around it say nothing to a reader."""
    failure: BaseException = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    assert isinstance(failure, Exception)  # noqa: S101 - a group of them holds nothing else
    return failure
