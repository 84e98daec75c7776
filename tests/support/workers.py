"""Worker processes of tests: started with the nano model, or with a script in its place."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from kronos_stream.daemon.inference.protocol import ForecastConfig
from kronos_stream.daemon.inference.supervisor import WorkerSupervisor
from kronos_stream.daemon.telemetry.metrics import Metrics
from tests.support import crashing_worker

NANO_CONFIG = ForecastConfig(
    "nano", device="cpu", dtype="float32", lookback=96, horizon=8, paths=20, seed=3
)

BATCH_SECONDS = 300.0
"""Deadline that a working worker meets on any machine."""


@asynccontextmanager
async def started_worker(
    config: ForecastConfig = NANO_CONFIG,
    *,
    standby: bool = False,
    command: Sequence[str] | None = None,
) -> AsyncIterator[tuple[WorkerSupervisor, Metrics]]:
    """Start a worker and yield it with its metrics; close it at the end."""
    metrics = Metrics()
    worker = (
        WorkerSupervisor(config, metrics, standby=standby)
        if command is None
        else WorkerSupervisor(config, metrics, standby=standby, command=command)
    )
    await worker.start()
    try:
        yield worker, metrics
    finally:
        await worker.close()


def crashing_command(symbols: Sequence[str]) -> tuple[str, ...]:
    """Command of a worker without a model, killed by any request of one of these symbols."""
    return (sys.executable, crashing_worker.__file__, *symbols)


def restart_counts(metrics: Metrics) -> dict[str, float]:
    return {
        cause: metrics.worker_restarts.labels(cause)._value.get() for cause in ("hang", "crash")
    }


def is_alive(pid: int) -> bool:
    """Return whether the process runs; a zombie does not."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
