"""The work of ``kronos-stream forecast``: read, sample in blocks of paths, show."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kronos_stream import __version__
from kronos_stream.channels import CLOSE
from kronos_stream.commands._forecast_arguments import ForecastArguments
from kronos_stream.commands._forecast_window import InputWindow, bars_to_origin, cut_window
from kronos_stream.forecast.fan import Fan
from kronos_stream.forecast.paths_file import paths_writer
from kronos_stream.forecast.quantiles import check_supported
from kronos_stream.forecast.table import print_fan
from kronos_stream.market.candle_files import CandleTable, read_candles
from kronos_stream.market.utc import rfc3339

if TYPE_CHECKING:
    from kronos_stream import Forecaster

PATHS_PER_BLOCK = 512
"""Paths drawn at a time: enough to fill the hardware, few enough to hold and to show progress."""

_SUFFIXES = re.compile(
    r"(\.(csv|txt|tsv|parquet|pq|feather|arrow|gz|bz2|xz|zip|zst))+$", re.IGNORECASE
)


def run(request: ForecastArguments) -> None:
    """Do what ``request`` asks; errors it explains are click's or those ``cli.main`` knows."""
    try:
        check_supported(request.quantiles, request.paths)
    except ValueError as error:
        raise click.UsageError(f"{error}; raise --paths or change --quantiles") from None
    _check_sampling(request)
    table = read_candles(request.file, request.timeframe)
    end = bars_to_origin(request, table)
    forecaster = _load(request)
    window = cut_window(request, table, end, forecaster.max_context)
    settings = _provenance(request, table, window, forecaster)
    closes = _sample(request, table, window, forecaster, settings)
    fan = Fan(
        series=_series_name(request),
        timeframe=table.timeframe,
        origin=window.origin,
        last=float(window.values[-1, CLOSE]),
        times=window.future,
        closes=closes,
        probs=request.quantiles,
    )
    about = _caption(request, window)
    if request.plot:
        from kronos_stream.forecast.plot import draw_fan

        with _report_write_errors(request.plot):
            draw_fan(request.plot, table, fan, about)
    if request.as_json:
        click.echo(json.dumps(_json_report(fan, settings, window), indent=2, allow_nan=False))
    else:
        print_fan(fan, about)


def _check_sampling(request: ForecastArguments) -> None:
    """Refuse what the engine would refuse after the model is loaded."""
    from kronos_stream.engine.sampling import Sampling

    try:
        Sampling(request.temperature, request.top_k, request.top_p)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _load(request: ForecastArguments) -> Forecaster:
    with _stderr_console().status(f"loading {request.model}"):
        from kronos_stream import Forecaster

        try:
            return Forecaster.from_pretrained(
                request.model,
                tokenizer=request.tokenizer,
                revision=request.revision,
                device=request.device,
                dtype=request.dtype,
                max_context=request.max_context,
            )
        except ValueError as error:
            raise click.UsageError(str(error)) from None


def _sample(
    request: ForecastArguments,
    table: CandleTable,
    window: InputWindow,
    forecaster: Forecaster,
    settings: dict[str, Any],
) -> NDArray[np.float32]:
    """Closes (paths, horizon) of all paths; whole candles go to --out, a block at a time."""
    closes = np.empty((request.paths, request.horizon), np.float32)
    with ExitStack() as stack:
        writer = None
        if request.out:
            stack.enter_context(_report_write_errors(request.out))
            writer = stack.enter_context(
                paths_writer(
                    request.out,
                    series=_series_name(request),
                    origin=window.origin,
                    times=window.future,
                    settings=settings,
                )
            )
        for first, paths in _blocks(request, table, window, forecaster):
            closes[first : first + len(paths)] = paths[..., CLOSE]
            if writer:
                writer.write(paths)
    return closes


def _blocks(
    request: ForecastArguments, table: CandleTable, window: InputWindow, forecaster: Forecaster
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Blocks of paths (n, horizon, 6) with the number of their first; together, one call's."""
    from kronos_stream import Context

    context = Context(
        window.values,
        window.times,
        series=request.series,
        timeframe=str(table.timeframe),
        future_times=window.future,
    )
    with _progress() as progress:
        task = progress.add_task("drawing paths", total=request.paths)
        for first in range(0, request.paths, PATHS_PER_BLOCK):
            count = min(PATHS_PER_BLOCK, request.paths - first)
            (paths,) = forecaster.sample(
                [context],
                horizon=request.horizon,
                paths=count,
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
                seed=request.seed,
                anchor=request.anchor,
                first_path=first,
            )
            yield first, paths
            progress.advance(task, count)


@contextmanager
def _report_write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror or error}") from None


def _progress() -> Progress:
    console = _stderr_console()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _stderr_console() -> Console:
    """Stderr: what is said on the way stays out of the result."""
    return Console(stderr=True)


def _series_name(request: ForecastArguments) -> str:
    # A file's name may hold bytes that are no text.
    name = os.fsencode(request.file.name).decode(errors="replace")
    return request.series or _SUFFIXES.sub("", name)


def _caption(request: ForecastArguments, window: InputWindow) -> str:
    parts = [
        request.model,
        f"{len(window.times)} bars",
        f"{request.paths} paths",
        f"T {request.temperature:g}",
        *([f"top-k {request.top_k}"] if request.top_k else []),
        *([f"top-p {request.top_p:g}"] if request.top_p < 1 else []),
        f"seed {request.seed}",
        "anchored" if request.anchor else "not anchored",
    ]
    return ", ".join(parts)


def _provenance(
    request: ForecastArguments, table: CandleTable, window: InputWindow, forecaster: Forecaster
) -> dict[str, Any]:
    """How the figures came about, for --json and for the metadata of --out."""
    loaded = forecaster.checkpoint
    return {
        "series": _series_name(request),
        "timeframe": str(table.timeframe),
        "origin": rfc3339(window.origin),
        "model": {
            "name": request.model,
            "revision": loaded and loaded.predictor.revision,
            "tokenizer": loaded and loaded.tokenizer.name,
            "tokenizer_revision": loaded and loaded.tokenizer.revision,
        },
        "engine": {
            "version": __version__,
            "device": str(forecaster.device),
            "dtype": str(forecaster.dtype).removeprefix("torch."),
        },
        "sampling": {
            "paths": request.paths,
            "temperature": request.temperature,
            "top_k": request.top_k,
            "top_p": request.top_p,
            "seed": request.seed,
            "anchor": request.anchor,
            "noise": request.series or 0,
        },
        "context": {
            "bars": len(window.times),
            "first": rfc3339(int(window.times[0])),
            "missing": window.missing,
            "volume": "reported" if table.has_volume else None,
            "amount": _amount_origin(table),
        },
    }


def _amount_origin(table: CandleTable) -> str | None:
    if not table.has_volume:
        return None
    return "reported" if table.has_amount else "derived"


def _json_report(fan: Fan, settings: dict[str, Any], window: InputWindow) -> dict[str, Any]:
    last = dict(zip(("open", "high", "low", "close", "volume"), window.values[-1], strict=False))
    return {
        **settings,
        "last": last,
        "times": [rfc3339(time) for time in fan.times.tolist()],
        "close": fan.columns(),
        "summary": fan.summary().to_dict(),
    }
