"""A daemon to be killed in the middle of a batch, and its worker.

``python -m tests.support.orphaned_worker daemon MARKER [hold]`` prints the worker's process id
and starts a batch. The worker creates the file MARKER when it has the batch; with ``hold`` it then
keeps the interpreter's lock, so that none of its threads can run.
"""

from __future__ import annotations

import asyncio
import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path

from kronos_stream.daemon.inference import worker_main
from kronos_stream.daemon.inference.protocol import (
    ForecastConfig,
    InferenceFailure,
    InferenceRequest,
    InferenceResult,
)
from kronos_stream.daemon.inference.supervisor import WorkerSupervisor
from kronos_stream.daemon.telemetry.metrics import Metrics
from tests.support.windows import random_window

_SERIES = 2000
_MEASURED_SERIES = 1000
"""Larger batches are the daemon's own."""


async def run_daemon(arguments: Sequence[str]) -> None:
    """Start the worker and send it a batch that takes long."""
    config = ForecastConfig("nano", device="cpu", lookback=96, horizon=8)
    command = (sys.executable, "-m", "tests.support.orphaned_worker", "worker", *arguments)
    worker = WorkerSupervisor(config, Metrics(), command=command)
    await worker.start()
    print(worker.pid, flush=True)  # noqa: T201
    await worker.forecast([random_window(0)] * _SERIES, 600)


def run_worker(marker: Path, descriptor: str, *, hold: bool) -> None:
    """Run the worker's main program with a marker at the start of the batch."""

    class MarkingHost(worker_main.ModelHost):
        def infer(
            self, requests: Sequence[InferenceRequest]
        ) -> list[InferenceResult | InferenceFailure]:
            if len(requests) > _MEASURED_SERIES:
                marker.touch()
                if hold:
                    ctypes.PyDLL(None).sleep(600)  # PyDLL does not release the lock
            return super().infer(requests)

    worker_main.ModelHost = MarkingHost  # type: ignore[misc]
    sys.argv[1:] = [descriptor]
    worker_main.main()


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    if role == "daemon":
        asyncio.run(run_daemon(arguments))
    else:
        run_worker(Path(arguments[0]), arguments[-1], hold="hold" in arguments)
