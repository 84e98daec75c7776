"""Implementation of ``kronos-stream bench``: times of forecast calls, and their report."""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter

import click
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from kronos_stream.commands._bench_machine import (
    Machine,
    measure_machine,
    median_seconds,
    synchronise,
    time_call,
)
from kronos_stream.commands._bench_precision import Precision, compare_precision
from kronos_stream.commands._progress import progress_bar
from kronos_stream.engine import Context, Forecaster
from kronos_stream.engine.context import prepare
from kronos_stream.engine.cost import Workload, stage_costs
from kronos_stream.engine.device import pick_device, pick_dtype
from kronos_stream.engine.sampling import Sampling
from kronos_stream.engine.uncached import generate
from kronos_stream.model import Predictor, Tokenizer
from kronos_stream.model.config import PUBLISHED_PREDICTORS, PUBLISHED_TOKENIZER

STAGES = ("encode", "prefill", "decode", "detokenise")
_PRECISION_BARS = 200
_PRECISION_PATHS = 64
_UNCACHED_WINDOWS = 8
"""Windows on which the plain loop is measured; its time is proportional to windows and steps."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings shared by all measurements of a run."""

    device: torch.device
    lookback: int
    horizon: int
    top_p: float
    repeats: int


@dataclass(frozen=True, slots=True)
class Row:
    """One measured forecast call; seconds are medians."""

    model: str
    dtype: str
    contexts: int
    paths: int
    seconds: float
    slowest: float
    stages: dict[str, float]
    gflop: float
    floor_seconds: float
    path_steps_per_second: float
    uncached_seconds: float | None


def run(
    *,
    models: list[str],
    shapes: list[tuple[int, int]],
    lookback: int,
    horizon: int,
    top_p: float,
    device: str,
    dtypes: list[str],
    repeats: int,
    uncached: bool,
    precision: int,
    precision_model: str,
    as_json: bool,
) -> None:
    """Measure and print; progress goes to stderr."""
    setup = Setup(pick_device(device), lookback, horizon, top_p, repeats)
    names = (str(pick_dtype(name, setup.device)).removeprefix("torch.") for name in dtypes)
    distinct = list(dict.fromkeys(names))
    rows: list[Row] = []
    with progress_bar() as progress:
        total = len(models) * len(distinct) * len(shapes)
        task = progress.add_task("this machine", total=total)
        machine = measure_machine(setup.device)
        for row in _measure_all(setup, machine, models, distinct, shapes, uncached=uncached):
            rows.append(row)
            result = f"{_label(row)}: {row.seconds:.3f} s"
            progress.update(task, advance=1, description=result)
            if progress.disable:
                click.echo(result, err=True)
    compared = None
    if precision:
        contexts = random_walk_contexts(precision, _PRECISION_BARS)
        compared = compare_precision(
            precision_model, contexts, horizon=horizon, paths=_PRECISION_PATHS, device=device
        )
    if as_json:
        report = {
            "machine": asdict(machine),
            "lookback": lookback,
            "horizon": horizon,
            "rows": [asdict(row) for row in rows],
            "precision": None if compared is None else asdict(compared),
        }
        click.echo(json.dumps(report, indent=2))
    else:
        _print_report(machine, rows, setup, uncached=uncached)
        if compared is not None:
            click.echo(_precision_text(precision_model, compared))


def _measure_all(
    setup: Setup,
    machine: Machine,
    models: Sequence[str],
    dtypes: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    *,
    uncached: bool,
) -> Iterator[Row]:
    for name in models:
        torch.manual_seed(0)
        predictor = Predictor(PUBLISHED_PREDICTORS[name]).eval()
        tokenizer = Tokenizer(PUBLISHED_TOKENIZER).eval()
        uncached_step = _uncached_step(predictor, tokenizer, setup) if uncached else None
        for dtype in dtypes:
            forecaster = Forecaster(
                predictor,
                tokenizer,
                device=str(setup.device),
                dtype=dtype,
                max_context=setup.lookback + setup.horizon,
            )
            for contexts, paths in shapes:
                yield _measure(name, forecaster, machine, setup, contexts, paths, uncached_step)


def _measure(
    name: str,
    forecaster: Forecaster,
    machine: Machine,
    setup: Setup,
    contexts: int,
    paths: int,
    uncached_step: float | None,
) -> Row:
    batch = random_walk_contexts(contexts, setup.lookback)
    stages: dict[str, list[float]] = defaultdict(list)

    def call() -> None:
        timer = _StageTimer(forecaster.device)
        forecaster.on_stage = timer
        forecaster.sample(batch, setup.horizon, paths, top_p=setup.top_p)
        for stage, seconds in timer.seconds.items():
            stages[stage].append(seconds)

    # On a GPU the second call captures the graph; the third is the first in steady state.
    for _ in range(3 if forecaster.device.type == "cuda" else 1):
        call()
    stages.clear()
    times = [time_call(call, forecaster.device) for _ in range(setup.repeats)]
    dtype = str(forecaster.dtype).removeprefix("torch.")
    work = Workload(contexts, paths, setup.lookback, setup.horizon)
    costs = stage_costs(
        PUBLISHED_PREDICTORS[name], PUBLISHED_TOKENIZER, work, forecaster.dtype.itemsize
    )
    floor = sum(
        cost.seconds(
            # The tokenizer's encoder is always float32.
            1e9 * machine.gflops["float32" if stage == "encode" else dtype],
            1e9 * machine.gigabytes_per_second,
        )
        for stage, cost in costs.items()
    )
    seconds = statistics.median(times)
    return Row(
        model=name,
        dtype=dtype,
        contexts=contexts,
        paths=paths,
        seconds=seconds,
        slowest=max(times),
        stages={stage: statistics.median(stages[stage]) for stage in STAGES},
        gflop=sum(cost.flops for cost in costs.values()) / 1e9,
        floor_seconds=floor,
        path_steps_per_second=work.path_steps / seconds,
        uncached_seconds=None
        if uncached_step is None
        else uncached_step * contexts * paths * setup.horizon,
    )


class _StageTimer:
    """Adds up the time between stage marks."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._device = device
        self._stage: str | None = None
        self._since = 0.0

    def __call__(self, stage: str) -> None:
        synchronise(self._device)
        now = perf_counter()
        if self._stage in self.seconds:
            self.seconds[self._stage] += now - self._since
        self._stage, self._since = stage, now


@torch.inference_mode()
def _uncached_step(predictor: Predictor, tokenizer: Tokenizer, setup: Setup) -> float:
    """Seconds per window and step of a plain float32 loop: the mean of its first two steps."""
    device = setup.device
    item = prepare(random_walk_contexts(1, setup.lookback)[0], 0, 2)
    candles = torch.from_numpy(item.normalised)[None].to(device)
    stamps = torch.from_numpy(item.stamps)[None].to(device)
    noise = torch.full((2, 2, 1, _UNCACHED_WINDOWS), 0.5, device=device)
    on_device = predictor.to(device), tokenizer.to(device)

    def call() -> None:
        generate(
            *on_device,
            candles,
            stamps,
            noise,
            max_context=setup.lookback + 2,
            sampling=Sampling(top_p=setup.top_p),
        )

    return median_seconds(call, device, 1) / (2 * _UNCACHED_WINDOWS)


def random_walk_contexts(contexts: int, lookback: int) -> list[Context]:
    """Seeded random-walk candles."""
    rng = np.random.default_rng(0)
    batch = []
    for i in range(contexts):
        path = 100 * np.exp(np.cumsum(rng.normal(0, 0.002, lookback + 1)))
        opened, closed = path[:-1], path[1:]
        high = np.maximum(opened, closed) * np.exp(rng.exponential(0.001, lookback))
        low = np.minimum(opened, closed) * np.exp(-rng.exponential(0.001, lookback))
        volume = rng.lognormal(3, 1, lookback)
        values = np.stack((opened, high, low, closed, volume, volume * closed), axis=-1)
        times = 1_700_000_100_000 + 300_000 * np.arange(lookback)
        batch.append(Context(values, times, series=f"bench:{i}", timeframe="5m"))
    return batch


def _label(row: Row) -> str:
    short = {"float32": "", "bfloat16": " bf16"}[row.dtype]
    return f"{row.model} {row.contexts}x{row.paths}{short}"


def _print_report(machine: Machine, rows: list[Row], setup: Setup, *, uncached: bool) -> None:
    console = Console(width=None if sys.stdout.isatty() else 80)
    rates = ", ".join(f"{name} {rate:,.0f} GFLOP/s" for name, rate in machine.gflops.items())
    console.print(
        f"{machine.device}, {machine.threads} threads, torch {machine.torch}: matrix products "
        f"{rates}; memory reads {machine.gigabytes_per_second:,.0f} GB/s",
        highlight=False,
    )
    table = Table(
        title=f"lookback {setup.lookback}, horizon {setup.horizon}, top-p {setup.top_p}; "
        f"seconds, median of {setup.repeats}",
        title_style="",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for column in ("total", *STAGES[:3], "detok.", "steps/s", "floor", "faster"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        plain = row.uncached_seconds
        table.add_row(
            _label(row),
            f"{row.seconds:.3f}",
            *(f"{row.stages[stage]:.3f}" for stage in STAGES),
            f"{row.path_steps_per_second:,.0f}",
            f"{row.floor_seconds / row.seconds:.0%}",
            "-" if plain is None else f"{plain / row.seconds:,.0f}x",
        )
    console.print(table)
    console.print(
        "steps/s: bars sampled per second, over all paths\n"
        "floor: share of the time that the counted operations and bytes need at these rates",
        highlight=False,
    )
    if uncached:
        console.print(
            "faster: speed-up over a plain float32 loop that recomputes its window at every step, "
            f"measured on {_UNCACHED_WINDOWS} windows for two steps and scaled to all",
            highlight=False,
        )


def _precision_text(model: str, result: Precision) -> str:
    return (
        f"bfloat16 against float32, {model}, {result.contexts} contexts x {result.paths} paths x "
        f"{result.horizon} bars: quantiles of the close differ {result.same_noise:.2f} times as "
        f"much as those of two float32 seeds ({result.other_noise:.2f} with the other seed's "
        f"noise); {result.flips:.2%} of tokens differ after equal history, "
        f"{result.paths_apart:.0%} of paths differ somewhere"
    )
