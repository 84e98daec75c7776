"""Supervisor of a worker process: replaces it when it hangs or dies, and retries its batch.

The event loop never blocks on the worker: all messages are asynchronous and sent in chunks. A
batch that misses its deadline, or whose worker dies, is tried again on a new worker. If that fails
too, it is split in halves until the request that kills workers is isolated.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import structlog

from kronos_stream.backoff import Backoff
from kronos_stream.bars.window import Window
from kronos_stream.daemon.inference.backend import BatchResult, WorkerError, WorkerLost
from kronos_stream.daemon.inference.process import WorkerCrashed, WorkerProcess
from kronos_stream.daemon.inference.protocol import (
    ForecastConfig,
    InferenceFailure,
    InferenceRequest,
    InferenceResult,
    ModelIdentity,
    ModelLoaded,
)
from kronos_stream.daemon.telemetry.metrics import Metrics

_log = structlog.get_logger()

# -P: modules in the current directory must not shadow ours.
_COMMAND = (sys.executable, "-P", "-m", "kronos_stream.daemon.inference.worker_main")

_MAX_ATTEMPTS = 2
"""Attempts of a whole batch before it is split."""

_MIN_DEADLINE_SECONDS = 2.0
"""Shortest deadline of a part of a batch."""

_QUARANTINE_SECONDS = 300.0
"""A series that killed a worker fails without an attempt for this long."""

_MAX_STARTS = 5
"""Consecutive failed starts after which the worker is not restarted."""

_START_TIMEOUT_SECONDS = 120.0
_FIRST_START_TIMEOUT_SECONDS = 900.0
"""The first start may download a model."""

_DECAY = 0.8
"""Weight of earlier speed measurements after each batch."""


class _SubBatch(NamedTuple):
    """Requests of a batch, by index, that are tried together."""

    indices: Sequence[int]
    deadline: float
    attempts: int

    def split(self) -> tuple[_SubBatch, _SubBatch]:
        """Return two halves with half the deadline each."""
        middle = len(self.indices) // 2
        deadline = max(self.deadline / 2, _MIN_DEADLINE_SECONDS)
        return (
            _SubBatch(self.indices[:middle], deadline, 1),
            _SubBatch(self.indices[middle:], deadline, 1),
        )


class WorkerSupervisor:
    """Inference backend of one worker process, which runs one batch at a time."""

    def __init__(
        self,
        config: ForecastConfig,
        metrics: Metrics,
        *,
        standby: bool = False,
        command: Sequence[str] = _COMMAND,
    ) -> None:
        """command: of the worker; the number of its socket's file descriptor is appended.

        standby: keep a second process that has imported its modules but loaded no model. It costs
            280 MB of memory and saves most of the time that a replacement takes.
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
        """Process id, None while there is no process."""
        return None if self._process is None else self._process.pid

    def problem(self) -> str:
        return "the worker is starting" if self._process is None else ""

    async def start(self) -> ModelIdentity:
        try:
            loaded = await self._spawn(_FIRST_START_TIMEOUT_SECONDS, measure=True)
        except WorkerCrashed as crash:
            raise WorkerLost(f"the worker did not start ({crash.cause}); see its log") from None
        self._record_speed(loaded.measured_series, loaded.measured_seconds)
        _log.info(
            "worker ready",
            model=loaded.identity.model.name,
            device=loaded.identity.engine.device,
            dtype=loaded.identity.engine.dtype,
            threads=self._config.threads,
            milliseconds_per_series=round(1000 * self.estimate_seconds(1), 2),
        )
        return loaded.identity

    def estimate_seconds(self, count: int) -> float:
        """Estimated duration of a batch, from recent measurements."""
        return (
            count * self._measured_seconds / self._measured_series if self._measured_series else 0.0
        )

    def capacity(self, seconds: float) -> int:
        one = self.estimate_seconds(1)
        return max(1, int(min(seconds / one, 1e9))) if one else 1

    async def forecast(self, windows: Sequence[Window], deadline: float) -> BatchResult:
        """Forecast from each window; ``deadline`` seconds are given to each attempt.

        A window that cannot be forecast, or that kills the worker, becomes an InferenceFailure
        without affecting the others. Raises WorkerLost.
        """
        requests = [_to_request(window) for window in windows]
        async with self._lock:
            results = self._quarantine_failures(requests)
            healthy = [i for i in range(len(requests)) if i not in results]
            seconds = await self._infer(requests, healthy, deadline, results)
        return BatchResult([results[i] for i in range(len(requests))], seconds)

    async def run(self) -> None:
        """Replace the worker also when it dies between batches; until cancelled."""
        while True:
            if self._process is not None:
                await self._process.wait()
            async with self._lock:
                await self._ensure_process()

    async def close(self) -> None:
        """End both processes; no other method may be running."""
        standby, process = self._standby_process, self._process
        self._standby_process = self._process = None
        if standby is not None:
            await standby.kill()
        if process is not None:
            await process.close()

    async def _infer(
        self,
        requests: Sequence[InferenceRequest],
        indices: Sequence[int],
        deadline: float,
        results: dict[int, InferenceResult | InferenceFailure],
    ) -> float:
        """Add the results of the requests at ``indices``; return the seconds of inference."""
        parts = [_SubBatch(indices, deadline, _MAX_ATTEMPTS)] if indices else []
        # Isolating one bad request takes this many consecutive failures, twice over for a second
        # one. If there are more, the requests are not the cause.
        max_failures = _MAX_ATTEMPTS + 2 * len(indices).bit_length()
        failures, suspects, seconds = 0, [], 0.0
        while parts:
            part = parts.pop()
            try:
                batch = await self._attempt([requests[i] for i in part.indices], part.deadline)
            except WorkerCrashed as crash:
                failures += 1
                alone = len(part.indices) == 1
                if failures >= max_failures or (alone and part.attempts == 1):
                    suspects += [requests[i].series for i in part.indices]
                    failed = InferenceFailure(f"the worker does not survive it ({crash.cause})")
                    results.update(dict.fromkeys(part.indices, failed))
                elif part.attempts > 1:
                    parts.append(part._replace(attempts=part.attempts - 1))
                else:
                    parts += reversed(part.split())
                continue
            failures, seconds = 0, seconds + batch.seconds
            results.update(zip(part.indices, batch.results, strict=True))
        if seconds:  # if every request failed, the cause is elsewhere
            now = asyncio.get_running_loop().time()
            self._quarantine |= dict.fromkeys(suspects, now + _QUARANTINE_SECONDS)
        return seconds

    async def _attempt(self, requests: Sequence[InferenceRequest], deadline: float) -> BatchResult:
        """Run a batch once. Raises WorkerCrashed if the worker does not survive it."""
        process, batch = await self._ensure_process(), None
        try:
            batch = await process.infer(requests, deadline)
        except WorkerCrashed as crash:
            self._metrics.worker_restarts.labels(crash.cause).inc()
            _log.warning("worker lost", cause=crash.cause, series=len(requests), deadline=deadline)
            if crash.cause == "hang":
                self._record_speed(len(requests), deadline)
            raise
        finally:
            if batch is None:
                self._process = None
        self._record_speed(len(requests), batch.seconds)
        return batch

    def _quarantine_failures(
        self, requests: Sequence[InferenceRequest]
    ) -> dict[int, InferenceResult | InferenceFailure]:
        """Return failures, by index, of the requests that are not tried."""
        now = asyncio.get_running_loop().time()
        self._quarantine = {name: end for name, end in self._quarantine.items() if end > now}
        return {
            i: InferenceFailure("not tried, because the worker did not survive it before")
            for i, request in enumerate(requests)
            if request.series in self._quarantine
        }

    def _record_speed(self, series: int, seconds: float) -> None:
        self._measured_series = _DECAY * self._measured_series + series
        self._measured_seconds = _DECAY * self._measured_seconds + seconds

    async def _ensure_process(self) -> WorkerProcess:
        """Return the running worker, or start a new one. Raises WorkerLost."""
        if self._process is not None and self._process.exited:
            self._metrics.worker_restarts.labels("crash").inc()
            _log.warning("worker found dead")
            dead, self._process = self._process, None
            await dead.kill()
        backoff = Backoff(Random(), initial=0.5, maximum=60.0, jitter=(1.0, 1.0))
        for attempt in range(_MAX_STARTS):
            if self._process is not None:
                return self._process
            if attempt:
                await asyncio.sleep(backoff.next_delay())
            try:
                await self._spawn(_START_TIMEOUT_SECONDS, measure=False)
                _log.info("worker replaced", pid=self.pid)
            except (WorkerCrashed, WorkerError) as error:
                _log.error("worker did not start", why=str(error))
        if self._process is None:
            raise WorkerLost(f"the worker failed to start {_MAX_STARTS} times; see its log")
        return self._process

    async def _spawn(self, seconds: float, *, measure: bool) -> ModelLoaded:
        """Start a process and load the model. Raises WorkerError and WorkerCrashed."""
        process, self._standby_process = self._standby_process, None
        if process is not None and process.exited:
            await process.kill()
            process = None
        if process is None:
            process = await self._launch()
        loaded = await process.load(self._config, seconds, measure=measure)
        self._process = process
        if self._standby:
            self._standby_process = await self._launch()
        return loaded

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
