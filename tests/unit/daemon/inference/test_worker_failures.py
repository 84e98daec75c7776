"""Worker processes that hang, crash or are killed: replaced, and their batch repeated."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.crashing_worker import RESULT
from tests.support.paths import ROOT
from tests.support.processes import wait_for
from tests.support.windows import random_window
from tests.support.workers import (
    BATCH_SECONDS,
    crashing_command,
    is_alive,
    restart_counts,
    started_worker,
)

_HANG_SECONDS = 20.0
"""Deadline that a stopped worker misses; its replacement meets it even on a busy machine."""


async def test_worker_ignores_signals_that_stop_the_daemon() -> None:
    async with started_worker() as (worker, metrics):
        pid = worker.pid
        assert pid is not None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
        assert (await worker.forecast([random_window(0)], BATCH_SECONDS)).results
        assert worker.pid == pid
        assert restart_counts(metrics) == {"hang": 0, "crash": 0}


async def test_batch_of_a_worker_that_crashes_or_hangs_is_repeated() -> None:
    windows = [random_window(i) for i in range(40)]
    async with started_worker() as (worker, metrics):
        expected = (await worker.forecast(windows, BATCH_SECONDS)).results

        crashed = worker.pid
        assert crashed is not None
        os.kill(crashed, signal.SIGSTOP)  # so that the batch is not done before the kill
        batch = asyncio.create_task(worker.forecast(windows, BATCH_SECONDS))
        await asyncio.sleep(0.1)
        os.kill(crashed, signal.SIGKILL)
        assert (await batch).results == expected
        assert restart_counts(metrics) == {"hang": 0, "crash": 1}
        assert not is_alive(crashed)

        hanging = worker.pid
        assert hanging is not None
        os.kill(hanging, signal.SIGSTOP)
        assert (await worker.forecast(windows, _HANG_SECONDS)).results == expected
        assert restart_counts(metrics) == {"hang": 1, "crash": 1}
        assert not is_alive(hanging)


async def test_worker_that_died_between_batches_is_replaced_by_the_next_batch() -> None:
    async with started_worker() as (worker, metrics):
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        assert (await worker.forecast([random_window(0)], BATCH_SECONDS)).results
        assert restart_counts(metrics) == {"hang": 0, "crash": 1}


async def test_worker_that_died_between_batches_is_replaced_before_the_next_batch() -> None:
    async with started_worker() as (worker, metrics):
        watching = asyncio.create_task(worker.run())
        pid = worker.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(BATCH_SECONDS):
            while worker.pid in (None, pid):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert restart_counts(metrics) == {"hang": 0, "crash": 1}
        watching.cancel()


async def test_standby_process_replaces_the_worker_and_is_closed_with_it() -> None:
    async with started_worker(standby=True) as (worker, metrics):
        first, standby = worker.pid, worker._standby_process
        assert first is not None
        assert standby is not None
        os.kill(first, signal.SIGKILL)
        await worker.forecast([random_window(1)], BATCH_SECONDS)
        assert worker.pid == standby.pid
        assert restart_counts(metrics) == {"hang": 0, "crash": 1}
        next_standby = worker._standby_process
    assert next_standby is not None
    assert not is_alive(next_standby.pid)
    assert not is_alive(standby.pid)


async def test_cancelled_batch_ends_the_worker() -> None:
    async with started_worker() as (worker, _):
        pid = worker.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)  # so that the batch is not done before the cancellation
        batch = asyncio.create_task(
            worker.forecast([random_window(i) for i in range(60)], BATCH_SECONDS)
        )
        await asyncio.sleep(0.1)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        assert not is_alive(pid)
        assert len((await worker.forecast([random_window(1)], BATCH_SECONDS)).results) == 1


@pytest.mark.parametrize("crashing", [[2], [0, 6], [4, 5]])
async def test_contexts_that_crash_the_worker_are_isolated(crashing: list[int]) -> None:
    """The others are forecast; the next time these fail without an attempt."""
    windows = [random_window(i) for i in range(7)]
    command = crashing_command([f"S{i}/X" for i in crashing])
    async with started_worker(command=command) as (worker, metrics):
        for quarantined in (False, True):
            before = restart_counts(metrics)["crash"]
            results = (await worker.forecast(windows, BATCH_SECONDS)).results
            answered = [i for i, result in enumerate(results) if result == RESULT]
            assert answered == [i for i in range(7) if i not in crashing]
            assert (restart_counts(metrics)["crash"] == before) == quarantined


async def test_contexts_are_not_quarantined_if_all_crash_the_worker() -> None:
    """The search ends soon, and the next batch is tried like the first."""
    windows = [random_window(i) for i in range(7)]
    command = crashing_command([f"S{i}/X" for i in range(7)])
    async with started_worker(command=command) as (worker, metrics):
        for batches in (1, 2):
            results = (await worker.forecast(windows, BATCH_SECONDS)).results
            assert RESULT not in results
            assert 8 * batches <= restart_counts(metrics)["crash"] <= 11 * batches


@pytest.mark.parametrize("mode", ["computing", "hold"])
def test_worker_exits_when_the_daemon_is_killed(tmp_path: Path, mode: str) -> None:
    """Even in the middle of a batch, and if no Python code can run in the worker."""
    if mode == "hold" and sys.platform != "linux":
        pytest.skip("only Linux kills the children of a process that exited")
    marker = tmp_path / "batch"
    command = [sys.executable, "-m", "tests.support.orphaned_worker", "daemon", str(marker), mode]
    with subprocess.Popen(  # noqa: S603
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as daemon:
        try:
            assert daemon.stdout is not None
            pid = next(int(line) for line in daemon.stdout if line.strip().isdigit())
            wait_for("the worker has the batch", marker.exists)
        finally:
            daemon.kill()
    wait_for("the worker has exited", lambda: not is_alive(pid))
