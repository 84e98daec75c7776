"""The worker process with the nano checkpoint: exact, and replaced when it hangs, dies or is lost.

Real processes and real signals; only what brings a worker down is made up.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kronos_stream import Context, Forecaster
from kronos_stream.bars.scaling import price_scale, scale_prices
from kronos_stream.bars.window import Window
from kronos_stream.daemon.inference.protocol import (
    ForecastConfig,
    InferenceFailure,
    InferenceResult,
)
from kronos_stream.daemon.inference.supervisor import (
    WorkerError,
    WorkerLost,
    WorkerSupervisor,
)
from kronos_stream.daemon.inference.worker_main import ModelHost
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.forecast.outlook import Outlook, build_outlook
from kronos_stream.market.candle import Candle
from kronos_stream.market.series import Series
from tests.support.processes import wait_for

PLAN = ForecastConfig(
    "nano", device="cpu", dtype="float32", lookback=96, horizon=8, paths=20, seed=3
)

PATIENCE = 300.0
"""Seconds for an honest batch on a busy machine."""


def window(i: int, bars: int = 96, columns: int = 6, price: float = 100.0) -> Window:
    """A series of one-second bars; ``i`` fixes its values."""
    random = np.random.default_rng(i)
    close = price * np.exp(random.normal(0, 0.01, bars).cumsum())
    opened = np.concatenate((close[:1], close[:-1]))
    volume = random.lognormal(3, 1, bars)
    values = np.stack(
        (
            opened,
            np.maximum(opened, close) * 1.002,
            np.minimum(opened, close) * 0.998,
            close,
            volume,
            volume * close,
        ),
        axis=1,
    ).astype(np.float32)
    last = Candle(1_700_000_000_000 + 1000 * (bars - 1), *map(float, values[-1]))
    times = 1_700_000_000_000 + 1000 * np.arange(bars)
    series = Series.parse(f"test:S{i}/X:1s")
    return Window(series, values[:, :columns], times, 0, 0, last, ())


@pytest.fixture(scope="module")
def nano() -> Forecaster:
    return Forecaster.from_pretrained("nano", device="cpu", dtype="float32")


def by_hand(nano: Forecaster, one: Window) -> Outlook:
    """What the message of ``one`` must say, drawn alone."""
    scale = price_scale(one.values)
    values = one.values.copy()
    values[:, [0, 1, 2, 3, 5][: one.values.shape[1] - 1]] *= np.float32(scale)
    context = Context(values, one.times, one.series.name, "1s")
    (paths,) = nano.sample([context], 8, 20, top_p=0.9, seed=3, anchor=True)
    paths[..., [0, 1, 2, 3, 5]] /= np.float32(scale)
    times = one.times[-1] + 1000 * np.arange(1, 9)
    return build_outlook(paths, times, one.last.close, PLAN.quantiles)


def outlooks(results: Sequence[InferenceResult | InferenceFailure]) -> list[Outlook]:
    assert all(isinstance(result, InferenceResult) for result in results), results
    return [result.outlook for result in results if isinstance(result, InferenceResult)]


@asynccontextmanager
async def started(
    plan: ForecastConfig = PLAN, **settings: Any
) -> AsyncIterator[tuple[WorkerSupervisor, Metrics]]:
    metrics = Metrics()
    worker = WorkerSupervisor(plan, metrics, **settings)
    await worker.start()
    try:
        yield worker, metrics
    finally:
        await worker.close()


def restarts(metrics: Metrics) -> dict[str, float]:
    return {c: metrics.worker_restarts.labels(c)._value.get() for c in ("hang", "crash")}


async def test_forecasts_are_those_made_by_hand(nano: Forecaster) -> None:
    """Bit for bit in any company; a context that is refused troubles no other."""
    windows = [
        *(window(i, bars=96 - i % 40) for i in range(30)),
        *(window(i, columns=5) for i in range(30, 34)),
        *(window(i, price=10.0**-i) for i in range(4, 12)),
    ]
    wanted = [by_hand(nano, one) for one in windows]
    bad = replace(windows[0], values=np.full_like(windows[0].values, np.nan))
    worker = WorkerSupervisor(PLAN, Metrics())
    identity = await worker.start()
    try:
        assert (identity.model, identity.tokenizer, identity.dtype) == ("nano", "nano", "float32")
        assert identity.revision is not None
        assert 0 < worker.estimate_seconds(1) < 60
        random = np.random.default_rng(0)
        for size in (len(windows), 17, 1):
            members = random.permutation(len(windows))[:size]
            company = [windows[i] for i in members]
            batch = await worker.forecast([*company, bad], PATIENCE)
            assert outlooks(batch.results[:-1]) == [wanted[i] for i in members]
            (failure,) = batch.results[-1:]
            assert isinstance(failure, InferenceFailure)
            assert "S0/X" in failure.reason
            assert batch.seconds > 0
    finally:
        await worker.close()
    assert worker.pid is None


async def test_a_worker_that_dies_or_hangs_is_replaced() -> None:
    """Signals that stop the daemon do not stop the worker."""
    windows = [window(i) for i in range(40)]
    async with started() as (worker, metrics):
        assert worker.pid is not None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(worker.pid, number)
        wanted = (await worker.forecast(windows, PATIENCE)).results
        assert restarts(metrics) == {"hang": 0, "crash": 0}
        for number, deadline, cause in (
            (signal.SIGKILL, PATIENCE, {"hang": 0, "crash": 1}),
            (signal.SIGSTOP, 20.0, {"hang": 1, "crash": 1}),
        ):
            pid = worker.pid
            batch = asyncio.create_task(worker.forecast(windows, deadline))
            await asyncio.sleep(0.1)
            os.kill(pid, number)
            assert (await batch).results == wanted
            assert restarts(metrics) == cause
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        os.kill(worker.pid, signal.SIGKILL)  # between batches, noticed by the next
        assert (await worker.forecast(windows[:2], PATIENCE)).results == wanted[:2]
        assert restarts(metrics) == {"hang": 1, "crash": 2}


async def test_a_worker_that_dies_between_batches_is_replaced_before_the_next() -> None:
    async with started() as (worker, metrics):
        watching = asyncio.create_task(worker.run())
        pid = worker.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE):
            while worker.pid in (None, pid):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert restarts(metrics) == {"hang": 0, "crash": 1}
        watching.cancel()


async def test_a_standby_takes_over_and_goes_with_the_worker() -> None:
    async with started(standby=True) as (worker, metrics):
        first, spare = worker.pid, worker._standby_process
        assert first is not None
        assert spare is not None
        os.kill(first, signal.SIGKILL)
        await worker.forecast([window(1)], PATIENCE)
        assert worker.pid == spare.pid
        assert restarts(metrics) == {"hang": 0, "crash": 1}
        next_spare = worker._standby_process
    assert next_spare is not None
    assert not alive(next_spare.pid)
    assert not alive(spare.pid)


async def test_a_cancelled_batch_leaves_nothing_behind() -> None:
    async with started() as (worker, _):
        pid = worker.pid
        batch = asyncio.create_task(worker.forecast([window(i) for i in range(60)], PATIENCE))
        await asyncio.sleep(0.1)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert len((await worker.forecast([window(1)], PATIENCE)).results) == 1


SCRIPTED_WORKER = """
import os, socket, sys
from kronos_stream.daemon.inference.protocol import FRAME_LENGTH, ResultChunk, InferenceFailure, ModelIdentity, ModelLoaded, encode_frame, decode_frame

stream = socket.socket(fileno=int(sys.argv[-1])).makefile("rwb")
poison = sys.argv[1:-1]

def read():
    head = stream.read(FRAME_LENGTH.size) or sys.exit()
    return decode_frame(stream.read(FRAME_LENGTH.unpack(head)[0]))

def send(message):
    stream.write(encode_frame(message))
    stream.flush()

read()
send(ModelLoaded(ModelIdentity("puppet", None, "", None, "cpu", "float32", 256, "0"), 1, 0.001))
while True:
    tasks = read().tasks
    if any(task.series.split("/")[0] in poison for task in tasks):
        os.kill(os.getpid(), 9)
    send(ResultChunk([InferenceFailure("drawn")] * len(tasks), True, 0.001))
"""
"""A worker process without a model, that dies of certain series."""


@pytest.mark.parametrize("poison", [[2], [0, 6], [4, 5]])
async def test_the_contexts_that_kill_workers_are_found(poison: list[int]) -> None:
    """The others are forecast; they fail, and fail at once the next time."""
    names = [f"test:S{i}" for i in poison]
    windows = [window(i) for i in range(7)]
    async with started(command=(sys.executable, "-c", SCRIPTED_WORKER, *names)) as (
        worker,
        metrics,
    ):
        for again in (False, True):
            before = restarts(metrics)["crash"]
            results = (await worker.forecast(windows, PATIENCE)).results
            drawn = [i for i, result in enumerate(results) if result == InferenceFailure("drawn")]
            assert drawn == [i for i in range(7) if i not in poison]
            assert (restarts(metrics)["crash"] == before) == again


async def test_where_nothing_can_be_drawn_no_context_is_to_blame() -> None:
    """The search ends soon, and the next batch is tried like the first."""
    names = [f"test:S{i}" for i in range(7)]
    async with started(command=(sys.executable, "-c", SCRIPTED_WORKER, *names)) as (
        worker,
        metrics,
    ):
        for times in (1, 2):
            results = (await worker.forecast([window(i) for i in range(7)], PATIENCE)).results
            assert not any(result == InferenceFailure("drawn") for result in results)
            assert 8 * times <= restarts(metrics)["crash"] <= 11 * times


HANGING_WORKER = """
import ctypes
from kronos_stream.daemon import worker_main

class Seized(worker_main.ModelHost):
    def draw(self, tasks):
        if len(tasks) > 1000:
            ctypes.PyDLL(None).sleep(60)  # the interpreter's lock is kept
        return super().draw(tasks)

worker_main.ModelHost = Seized
worker_main.main()
"""

DAEMON = """
import asyncio
import sys
import numpy as np
from kronos_stream.daemon.inference.protocol import ForecastConfig
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.daemon.inference.supervisor import WorkerSupervisor
from kronos_stream.market.candle import Candle
from kronos_stream.market.series import Series
from kronos_stream.bars.window import Window

async def main():
    plan = ForecastConfig("nano", device="cpu", lookback=96, horizon=8)
    worker = WorkerSupervisor(plan, Metrics(), command=(sys.executable, *sys.argv[1:]))
    await worker.start()
    print(worker.pid, flush=True)
    series, last = Series.parse("test:X/Y:1s"), Candle(95_000, 9, 9, 9, 9, 9)
    values = np.random.default_rng(0).lognormal(size=(96, 1)) + np.zeros((1, 6))
    window = Window(series, values, 1000 * np.arange(96), 0, 0, last, ())
    await worker.forecast([window] * 2000, 60)

asyncio.run(main())
"""


@pytest.mark.parametrize("what", ["computing", "seized"])
def test_no_worker_outlives_the_daemon(tmp_path: Path, what: str) -> None:
    """Killed with -9 in the middle of a batch, even if no Python can run in the worker."""
    command = ["-m", "kronos_stream.daemon.inference.worker_main"]
    if what == "seized":
        if sys.platform != "linux":
            pytest.skip("only Linux kills the children of the dead")
        (tmp_path / "seized.py").write_text(HANGING_WORKER)
        command = [str(tmp_path / "seized.py")]
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", DAEMON, *command], stdout=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stdout is not None
        pid = next(int(line) for line in daemon.stdout if line.strip().isdigit())
        time.sleep(1.0)
        daemon.kill()
        daemon.wait()
    wait_for("the worker has ended", lambda: not alive(pid))


def alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be buried does not."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (replace(PLAN, lookback=250), "250 bars and a horizon of 8 exceed the 256 bars"),
        (replace(PLAN, paths=18), "quantile 0.05 needs at least 19 paths"),
        (replace(PLAN, top_p=0.0), "top_p 0"),
        (replace(PLAN, dtype="float8"), "dtype 'float8'"),
    ],
)
def test_plans_that_cannot_be_carried_out(plan: ForecastConfig, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ModelHost(plan)


async def test_what_the_user_can_mend_is_said() -> None:
    worker = WorkerSupervisor(replace(PLAN, model="no/such/model"), Metrics())
    with pytest.raises(WorkerError, match="no/such/model"):
        await worker.start()
    assert worker.pid is None


async def test_a_process_that_does_not_start_is_no_users_fault() -> None:
    worker = WorkerSupervisor(
        PLAN, Metrics(), command=(sys.executable, "-c", "raise SystemExit(3)")
    )
    with pytest.raises(WorkerLost, match="did not start"):
        await worker.start()


def test_scales_are_powers_of_two_that_lift_what_hardly_moves() -> None:
    ordinary = window(1).values
    assert price_scale(ordinary) == 1
    for k in (20, 30, 60):
        scale = price_scale(scale_prices(ordinary, 2.0**-k))
        deviation = (scale_prices(ordinary, 2.0**-k)[:, 3] * np.float64(scale)).std()
        assert np.log2(scale) % 1 == 0
        assert 1 <= deviation < 2
    flat = np.full((50, 6), 1e-8, np.float32)
    assert 1e-9 / price_scale(flat) < 1e-15  # the model's 1e-5 is nothing beside the price
    assert price_scale(np.full((50, 6), 5e4, np.float32)) == 1
    assert price_scale(np.zeros((50, 5), np.float32)) == 1
    rich = scale_prices(ordinary, 2.0**-60)
    rich[:, 5] = 1e12
    assert 1 <= price_scale(rich) * 1e12 < 1e17


def test_tiny_prices_are_forecast_like_large_ones(nano: Forecaster) -> None:
    """A coin priced in another unit has the same future in that unit."""
    one = window(1, price=64.0)
    scale = 2.0 ** -np.floor(np.log2(one.values[:, 3].std()))
    one = replace(one, values=scale_prices(one.values, scale))
    one = replace(one, last=one.last._replace(close=float(one.values[-1, 3])))
    assert price_scale(one.values) == 1
    tiny = replace(
        one,
        values=scale_prices(one.values, 2.0**-40),
        last=one.last._replace(close=one.last.close * 2.0**-40),
    )
    large, small = by_hand(nano, one), by_hand(nano, tiny)
    assert small.summary.return_quantiles == large.summary.return_quantiles
    for name, band in large.channels["close"].items():
        np.testing.assert_allclose(
            np.array(small.channels["close"][name]) * 2.0**40, band, rtol=1e-6
        )


def test_the_daemons_process_does_without_torch() -> None:
    """It would cost the event loop's process 280 MB."""
    code = "import sys, kronos_stream.daemon.scheduling.scheduler; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603
