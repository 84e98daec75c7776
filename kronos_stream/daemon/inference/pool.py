"""One worker per device; batches are divided among them in proportion to their speed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace

from kronos_stream.bars.window import Window
from kronos_stream.daemon.inference.backend import (
    BatchResult,
    InferenceBackend,
    WorkerError,
    WorkerFactory,
)
from kronos_stream.daemon.inference.protocol import ForecastConfig, ModelIdentity
from kronos_stream.daemon.inference.supervisor import WorkerSupervisor
from kronos_stream.daemon.telemetry.metrics import Metrics


def create_backend(
    config: ForecastConfig,
    devices: Sequence[str],
    metrics: Metrics,
    *,
    standby: bool = False,
    worker_factory: WorkerFactory | None = None,
) -> InferenceBackend:
    """Create a worker for each device, and a pool if there are several.

    standby: keep a spare process per worker. worker_factory: replaces the worker processes.
    """

    def create_worker(device: str) -> InferenceBackend:
        on_device = replace(config, device=device)
        if worker_factory is not None:
            return worker_factory(on_device, metrics)
        return WorkerSupervisor(on_device, metrics, standby=standby)

    workers = [create_worker(device) for device in devices]
    return workers[0] if len(workers) == 1 else WorkerPool(workers)


class WorkerPool:
    """Workers with the same model on several devices, used as one backend."""

    def __init__(self, workers: Sequence[InferenceBackend]) -> None:
        self._workers = tuple(workers)

    def problem(self) -> str:
        """First problem of a worker; empty if all are ready."""
        return next((problem for worker in self._workers if (problem := worker.problem())), "")

    async def start(self) -> ModelIdentity:
        """Start all workers and return their common identity.

        Raises the error of a worker that does not start, and WorkerError if their results would
        differ.
        """
        first, *others = await asyncio.gather(*(worker.start() for worker in self._workers))
        for other in others:
            if other != first:
                raise WorkerError(
                    "the devices do not forecast alike: "
                    f"{first.engine.device} in {first.engine.dtype} and "
                    f"{other.engine.device} in {other.engine.dtype}; "
                    "set KRONOS_STREAM_DEVICE to devices of one kind"
                )
        return first

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for worker in self._workers:
                tasks.create_task(worker.run())

    async def close(self) -> None:
        await asyncio.gather(*(worker.close() for worker in self._workers))

    def estimate_seconds(self, count: int) -> float:
        """Estimated duration of the slowest share of a batch."""
        shares = zip(self._workers, self._shares(count), strict=True)
        return max(worker.estimate_seconds(share) for worker, share in shares)

    def capacity(self, seconds: float) -> int:
        return sum(worker.capacity(seconds) for worker in self._workers)

    async def forecast(self, windows: Sequence[Window], deadline: float) -> BatchResult:
        parts, begin = [], 0
        for worker, share in zip(self._workers, self._shares(len(windows)), strict=True):
            if share:
                parts.append(worker.forecast(windows[begin : begin + share], deadline))
            begin += share
        batches = await asyncio.gather(*parts)
        results = [result for batch in batches for result in batch.results]
        return BatchResult(results, max((batch.seconds for batch in batches), default=0.0))

    def _shares(self, count: int) -> Iterator[int]:
        """Yield the number of series for each worker; those that are not ready get none."""
        speeds = [
            0.0 if worker.problem() else 1 / max(worker.estimate_seconds(1), 1e-9)
            for worker in self._workers
        ]
        if not any(speeds):  # all are being replaced: share equally
            speeds = [1.0] * len(speeds)
        assigned, total, speed_so_far = 0, sum(speeds), 0.0
        for speed in speeds:
            speed_so_far += speed
            upto = round(count * speed_so_far / total)
            yield upto - assigned
            assigned = upto
