"""Who forecasts: a worker for each device, together as if they were one.

Bars close together, so a batch comes at once; it is shared out by how fast each device is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeAlias

from kronos_stream.bars.window import Window
from kronos_stream.daemon.config.settings import Settings
from kronos_stream.daemon.inference.protocol import ForecastConfig, ModelIdentity
from kronos_stream.daemon.inference.supervisor import BatchResult, WorkerError, WorkerSupervisor
from kronos_stream.daemon.scheduling.scheduler import BatchForecaster
from kronos_stream.daemon.telemetry.metrics import Metrics


class InferenceBackend(BatchForecaster, Protocol):
    """What the daemon needs of a worker."""

    def problem(self) -> str: ...

    async def start(self) -> ModelIdentity: ...

    async def run(self) -> None: ...

    async def close(self) -> None: ...


WorkerFactory: TypeAlias = Callable[[ForecastConfig, Metrics], InferenceBackend]


def create_backend(
    settings: Settings, metrics: Metrics, worker_factory: WorkerFactory | None = None
) -> InferenceBackend:
    """What the settings ask for: a worker, or a crew where they name more devices than one."""
    worker_factory = worker_factory or partial(WorkerSupervisor, standby=settings.standby)
    plan, devices = settings.forecast_config(), settings.devices
    workers = [worker_factory(replace(plan, device=device), metrics) for device in devices]
    return workers[0] if len(workers) == 1 else WorkerPool(workers)


class WorkerPool:
    """Workers of one model on several devices."""

    def __init__(self, workers: Sequence[InferenceBackend]) -> None:
        """workers: at least one."""
        self._workers = tuple(workers)

    def problem(self) -> str:
        """Why nothing can be forecast just now, or not by all; empty if it can."""
        return next((why for worker in self._workers if (why := worker.problem())), "")

    async def start(self) -> ModelIdentity:
        """Start all. The first one's identity stands for all of them.

        Raises what a worker's start raises, and WorkerError where they would not compute alike.
        """
        first, *others = await asyncio.gather(*(worker.start() for worker in self._workers))
        for other in others:
            if other != first:
                raise WorkerError(
                    "the devices do not forecast alike: "
                    f"{first.device} in {first.dtype} and {other.device} in {other.dtype}; "
                    "set KRONOS_STREAM_DEVICE to devices of one kind"
                )
        return first

    async def run(self) -> None:
        """Replace those that die; until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for worker in self._workers:
                tasks.create_task(worker.run())

    async def close(self) -> None:
        """End all; bounded."""
        await asyncio.gather(*(worker.close() for worker in self._workers))

    def estimate_seconds(self, count: int) -> float:
        """Seconds that forecasting so many series takes: as long as the last share of them."""
        shares = zip(self._workers, self._split(count), strict=True)
        return max(worker.estimate_seconds(share) for worker, share in shares)

    def capacity(self, seconds: float) -> int:
        """How many series can be forecast in so long."""
        return sum(worker.capacity(seconds) for worker in self._workers)

    async def forecast(self, windows: Sequence[Window], deadline: float) -> BatchResult:
        """As of a worker; each forecasts its share."""
        parts, begin = [], 0
        for worker, share in zip(self._workers, self._split(len(windows)), strict=True):
            if share:
                parts.append(worker.forecast(windows[begin : begin + share], deadline))
            begin += share
        batches = await asyncio.gather(*parts)
        results = [result for batch in batches for result in batch.results]
        return BatchResult(results, max((batch.seconds for batch in batches), default=0.0))

    def _split(self, count: int) -> Iterator[int]:
        """How many of so many series each worker gets."""
        speeds = [
            0.0 if worker.problem() else 1 / max(worker.estimate_seconds(1), 1e-9)
            for worker in self._workers
        ]
        if not any(speeds):  # whoever is replaced first
            speeds = [1.0] * len(speeds)
        done, total, part = 0, sum(speeds), 0.0
        for speed in speeds:
            part += speed
            upto = round(count * part / total)
            yield upto - done
            done = upto
