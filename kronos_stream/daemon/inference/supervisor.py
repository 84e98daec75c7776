"""The worker: a process that draws, replaced whenever it hangs or dies.

The event loop never waits for it: all that passes between the two is asynchronous and in pieces.
A batch that is not done by its deadline, or whose worker dies, is tried again on a new worker;
what fails again is halved, until the one context that brings workers down stands alone.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import NamedTuple

import structlog

from kronos_stream.bars.window import Window
from kronos_stream.daemon.inference.process import WorkerCrashed, WorkerError, WorkerProcess
from kronos_stream.daemon.inference.protocol import (
    ForecastConfig,
    InferenceFailure,
    InferenceRequest,
    InferenceResult,
    ModelIdentity,
    ModelLoaded,
)
from kronos_stream.daemon.telemetry.metrics import Metrics

__all__ = ["BatchResult", "WorkerError", "WorkerLost", "WorkerSupervisor"]

_log = structlog.get_logger()

# -P: what lies in the folder we were started in is no module of ours.
_COMMAND = (sys.executable, "-P", "-m", "kronos_stream.daemon.inference.worker_main")

_MAX_ATTEMPTS = 2
"""How often a batch is tried whole."""

_MIN_DEADLINE_SECONDS = 2.0
"""No part of a batch gets less time, however often it was halved."""

_QUARANTINE_SECONDS = 300.0
"""A series that brought the worker down by itself fails at once for so long."""

_MAX_STARTS = 5
"""Failed starts in a row after which the worker is given up."""

_START_TIMEOUT_SECONDS = 120.0
_FIRST_START_TIMEOUT_SECONDS = 900.0
"""The first may fetch a model."""

_DECAY = 0.8
"""What a measurement counts for after one more batch."""


class WorkerLost(Exception):  # noqa: N818
    """The worker does not start any more, whatever is tried."""


class BatchResult(NamedTuple):
    """What became of the windows given, in their order."""

    results: list[InferenceResult | InferenceFailure]
    seconds: float
    """What drawing them took in the worker."""


class _SubBatch(NamedTuple):
    """Tasks of a batch, by number, that are tried together."""

    indices: Sequence[int]
    deadline: float
    attempts: int

    def split(self) -> tuple[_SubBatch, _SubBatch]:
        """An honest half takes half the time."""
        middle = len(self.indices) // 2
        deadline = max(self.deadline / 2, _MIN_DEADLINE_SECONDS)
        return (
            _SubBatch(self.indices[:middle], deadline, 1),
            _SubBatch(self.indices[middle:], deadline, 1),
        )


class WorkerSupervisor:
    """One worker process at a time, and one batch."""

    def __init__(
        self,
        config: ForecastConfig,
        metrics: Metrics,
        *,
        standby: bool = False,
        command: Sequence[str] = _COMMAND,
    ) -> None:
        """``command`` is called with the number of the descriptor to talk over.

        standby: keep a second process that has imported everything but loaded nothing. It costs
            280 MB and saves most of the time that replacing a worker takes.
        """
        self._config = config
        self._metrics = metrics
        self._command = command
        self._standby = standby
        self._process: WorkerProcess | None = None
        self._standby_process: WorkerProcess | None = None
        self._lock = asyncio.Lock()
        self._measured_series, self._measured_seconds = 0.0, 0.0
        self._quarantine: dict[str, float] = {}

    @property
    def pid(self) -> int | None:
        """The process, None while there is none."""
        return None if self._process is None else self._process.pid

    def problem(self) -> str:
        """Why nothing can be forecast just now; empty if it can."""
        return "the worker is starting" if self._process is None else ""

    async def start(self) -> ModelIdentity:
        """Load the model and measure its speed.

        Raises WorkerError for what the user can mend, WorkerLost where the process does not live.
        """
        try:
            ready = await self._spawn(_FIRST_START_TIMEOUT_SECONDS, measure=True)
        except WorkerCrashed as broken:
            raise WorkerLost(f"the worker did not start ({broken.cause}); see its log") from None
        self._record_speed(ready.measured_series, ready.measured_seconds)
        _log.info(
            "worker ready",
            model=ready.identity.model,
            device=ready.identity.device,
            dtype=ready.identity.dtype,
            threads=self._config.threads,
            milliseconds_per_series=round(1000 * self.estimate_seconds(1), 2),
        )
        return ready.identity

    def estimate_seconds(self, count: int) -> float:
        """Seconds that forecasting so many series takes, by what was measured lately."""
        return (
            count * self._measured_seconds / self._measured_series if self._measured_series else 0.0
        )

    def capacity(self, seconds: float) -> int:
        """How many series can be forecast in so long; at least one."""
        one = self.estimate_seconds(1)
        return max(1, int(min(seconds / one, 1e9))) if one else 1

    async def forecast(self, windows: Sequence[Window], deadline: float) -> BatchResult:
        """Forecast from each of ``windows``; ``deadline`` seconds are given to each attempt.

        A window that cannot be forecast, or that alone costs the worker, is Failed; the others
        are not touched by it. Raises WorkerLost.
        """
        tasks = [_to_request(window) for window in windows]
        async with self._lock:
            results = self._quarantine_failures(tasks)
            healthy = [i for i in range(len(tasks)) if i not in results]
            seconds = await self._infer(tasks, healthy, deadline, results)
        return BatchResult([results[i] for i in range(len(tasks))], seconds)

    async def run(self) -> None:
        """Replace the worker also when it dies between batches; until cancelled."""
        while True:
            if self._process is not None:
                await self._process.wait()
            async with self._lock:
                await self._ensure_process()

    async def close(self) -> None:
        """End the process; bounded. Only when nothing else of this worker runs any more."""
        spare, child = self._standby_process, self._process
        self._standby_process = self._process = None
        if spare is not None:
            await spare.kill()
        if child is not None:
            await child.close()

    async def _infer(
        self,
        tasks: Sequence[InferenceRequest],
        members: Sequence[int],
        deadline: float,
        results: dict[int, InferenceResult | InferenceFailure],
    ) -> float:
        """Fill in ``results`` of the tasks numbered in ``members``; the seconds it took."""
        parts = [_SubBatch(members, deadline, _MAX_ATTEMPTS)] if members else []
        # Looking for one bad context takes so many failures in a row, twice over for a second.
        # More of them, and it is not the contexts.
        patience = _MAX_ATTEMPTS + 2 * len(members).bit_length()
        failures, suspects, total = 0, [], 0.0
        while parts:
            part = parts.pop()
            try:
                drawn, seconds = await self._attempt(
                    [tasks[i] for i in part.indices], part.deadline
                )
            except WorkerCrashed as broken:
                failures += 1
                alone = len(part.indices) == 1
                if failures >= patience or (alone and part.attempts == 1):
                    suspects += [tasks[i].series for i in part.indices]
                    failed = InferenceFailure(f"the worker does not survive it ({broken.cause})")
                    results.update(dict.fromkeys(part.indices, failed))
                elif part.attempts > 1:
                    parts.append(part._replace(attempts=part.attempts - 1))
                else:
                    parts += reversed(part.split())
                continue
            failures, total = 0, total + seconds
            results.update(zip(part.indices, drawn, strict=True))
        if total:  # where nothing at all could be drawn, no context is to blame
            now = asyncio.get_running_loop().time()
            self._quarantine |= dict.fromkeys(suspects, now + _QUARANTINE_SECONDS)
        return total

    async def _attempt(
        self, tasks: Sequence[InferenceRequest], deadline: float
    ) -> tuple[list[InferenceResult | InferenceFailure], float]:
        """One try on a living worker. Raises Broken if it costs the worker."""
        child, drawn = await self._ensure_process(), None
        try:
            drawn, seconds = await child.infer(tasks, deadline)
        except WorkerCrashed as broken:
            self._metrics.worker_restarts.labels(broken.cause).inc()
            _log.warning("worker lost", cause=broken.cause, series=len(tasks), deadline=deadline)
            if broken.cause == "hang":
                self._record_speed(len(tasks), deadline)
            raise
        finally:
            if drawn is None:
                self._process = None
        self._record_speed(len(tasks), seconds)
        return drawn, seconds

    def _quarantine_failures(
        self, tasks: Sequence[InferenceRequest]
    ) -> dict[int, InferenceResult | InferenceFailure]:
        """Results of the tasks that are not tried."""
        now = asyncio.get_running_loop().time()
        self._quarantine = {name: end for name, end in self._quarantine.items() if end > now}
        return {
            i: InferenceFailure("the worker did not survive its last one")
            for i, task in enumerate(tasks)
            if task.series in self._quarantine
        }

    def _record_speed(self, series: int, seconds: float) -> None:
        self._measured_series = _DECAY * self._measured_series + series
        self._measured_seconds = _DECAY * self._measured_seconds + seconds

    async def _ensure_process(self) -> WorkerProcess:
        """The worker; a new one where there is none."""
        if self._process is not None and self._process.exited:
            self._metrics.worker_restarts.labels("crash").inc()
            _log.warning("worker found dead")
            dead, self._process = self._process, None
            await dead.kill()
        for failed in range(_MAX_STARTS):
            if self._process is not None:
                return self._process
            if failed:
                await asyncio.sleep(2.0 ** (failed - 2))
            try:
                await self._spawn(_START_TIMEOUT_SECONDS, measure=False)
                _log.info("worker replaced", pid=self.pid)
            except (WorkerCrashed, WorkerError) as error:
                _log.error("worker did not start", why=str(error))
        if self._process is None:
            raise WorkerLost(f"the worker failed to start {_MAX_STARTS} times; see its log")
        return self._process

    async def _spawn(self, seconds: float, *, measure: bool) -> ModelLoaded:
        """Have a process that is ready. Raises WorkerError and Broken."""
        child, self._standby_process = self._standby_process, None
        if child is not None and child.exited:
            await child.kill()
            child = None
        if child is None:
            child = await self._launch()
        ready = await child.load(self._config, seconds, measure=measure)
        self._process = child
        if self._standby:
            self._standby_process = await self._launch()
        return ready

    async def _launch(self) -> WorkerProcess:
        return await WorkerProcess.launch(self._command, self._config.threads)


def _to_request(window: Window) -> InferenceRequest:
    return InferenceRequest(
        window.series.name,
        str(window.series.timeframe),
        window.values,
        window.times,
        window.last.close,
    )
