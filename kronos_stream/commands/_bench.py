"""What ``kronos-stream bench`` measures, and how it is shown."""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from time import perf_counter

import click
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kronos_stream.commands._bench_machine import (
    Machine,
    measure_machine,
    median_seconds,
    synchronise,
    time_call,
)
from kronos_stream.commands._bench_precision import compare_precision
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
"""Windows the plain loop is measured on; its time is proportional to them and to the steps."""


@dataclass(frozen=True, slots=True)
class Options:
    """See the command's help."""

    models: list[str]
    shapes: list[tuple[int, int]]
    lookback: int
    horizon: int
    top_p: float
    device: str
    dtypes: list[str]
    repeats: int
    uncached: bool
    precision: int
    precision_model: str


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


def run(options: Options, *, as_json: bool) -> None:
    """Measure and print; progress goes to stderr."""
    device = pick_device(options.device)
    dtypes = {str(pick_dtype(name, device)).removeprefix("torch."): None for name in options.dtypes}
    rows: list[Row] = []
    with Progress(
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(
            "this machine", total=len(options.models) * len(dtypes) * len(options.shapes)
        )
        machine = measure_machine(device)
        for name in options.models:
            torch.manual_seed(0)
            predictor = Predictor(PUBLISHED_PREDICTORS[name]).eval()
            tokenizer = Tokenizer(PUBLISHED_TOKENIZER).eval()
            slow = (
                _uncached_step(predictor, tokenizer, options, device) if options.uncached else None
            )
            for dtype in dtypes:
                forecaster = Forecaster(
                    predictor,
                    tokenizer,
                    device=str(device),
                    dtype=dtype,
                    max_context=options.lookback + options.horizon,
                )
                for contexts, paths in options.shapes:
                    bar.update(task, description=f"{name} {dtype} {contexts}x{paths}")
                    rows.append(_measure(name, forecaster, machine, options, contexts, paths, slow))
                    bar.advance(task)
                    if bar.disable:
                        done = f"{_label(rows[-1])}: {rows[-1].seconds:.3f} s"
                        click.echo(done, err=True)
    precision = None
    if options.precision:
        precision = compare_precision(
            options.precision_model,
            random_walk_contexts(options.precision, _PRECISION_BARS),
            horizon=options.horizon,
            paths=_PRECISION_PATHS,
            device=options.device,
        )
    if as_json:
        report = {
            "machine": asdict(machine),
            "lookback": options.lookback,
            "horizon": options.horizon,
            "rows": [asdict(row) for row in rows],
            "precision": None if precision is None else asdict(precision),
        }
        click.echo(json.dumps(report, indent=2))
    else:
        _print_report(machine, rows, options)
        if precision is not None:
            click.echo(
                f"bfloat16 against float32, {options.precision_model}, {precision.contexts} "
                f"contexts x {precision.paths} paths x {precision.horizon} bars: quantiles of the "
                f"close lie {precision.same_noise:.2f} times as far apart as those of two float32 "
                f"seeds ({precision.other_noise:.2f} on the other seed's noise); "
                f"{precision.flips:.2%} of tokens flip after equal history, "
                f"{precision.paths_apart:.0%} of paths differ somewhere"
            )


def _measure(
    name: str,
    forecaster: Forecaster,
    machine: Machine,
    options: Options,
    contexts: int,
    paths: int,
    uncached_step: float | None,
) -> Row:
    batch = random_walk_contexts(contexts, options.lookback)
    stages: dict[str, list[float]] = defaultdict(list)

    def call() -> None:
        clock = _StageTimer(forecaster.device)
        forecaster.on_stage = clock
        forecaster.sample(batch, options.horizon, paths, top_p=options.top_p)
        for stage, seconds in clock.seconds.items():
            stages[stage].append(seconds)

    # The second call on a GPU captures the graph: two calls are not yet the steady state.
    for _ in range(3 if forecaster.device.type == "cuda" else 1):
        call()
    stages.clear()
    times = [time_call(call, forecaster.device) for _ in range(options.repeats)]
    dtype = str(forecaster.dtype).removeprefix("torch.")
    work = Workload(contexts, paths, options.lookback, options.horizon)
    costs = stage_costs(
        PUBLISHED_PREDICTORS[name], PUBLISHED_TOKENIZER, work, forecaster.dtype.itemsize
    )
    floor = sum(
        cost.seconds(
            # The tokenizer's encoder is float32 whatever the rest is.
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
        else uncached_step * contexts * paths * options.horizon,
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
def _uncached_step(
    predictor: Predictor, tokenizer: Tokenizer, options: Options, device: torch.device
) -> float:
    """Seconds a plain float32 loop takes per window and step: the mean of its first two steps."""
    item = prepare(random_walk_contexts(1, options.lookback)[0], 0, 2)
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
            max_context=options.lookback + 2,
            sampling=Sampling(top_p=options.top_p),
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


def _print_report(machine: Machine, rows: list[Row], options: Options) -> None:
    console = Console(width=None if sys.stdout.isatty() else 80)
    rates = ", ".join(f"{name} {rate:,.0f} GFLOP/s" for name, rate in machine.gflops.items())
    console.print(
        f"{machine.device}, {machine.threads} threads, torch {machine.torch}: matrix products "
        f"{rates}; memory reads {machine.gigabytes_per_second:,.0f} GB/s",
        highlight=False,
    )
    table = Table(
        title=f"lookback {options.lookback}, horizon {options.horizon}, top-p {options.top_p}; "
        f"seconds, median of {options.repeats}",
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
        "steps/s: bars drawn, of all paths\n"
        "floor: the share of the time that the counted operations and bytes need at these rates",
        highlight=False,
    )
    if options.uncached:
        console.print(
            "faster: than a plain float32 loop that recomputes its window every step, from its "
            f"time on {_UNCACHED_WINDOWS} windows for two steps, scaled to the windows and steps",
            highlight=False,
        )
