"""Implementation of ``kronos-stream forecast``: read candles, sample paths, show the result."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from kronos_stream import __version__
from kronos_stream.channels import CHANNELS, CLOSE
from kronos_stream.commands._forecast_window import InputWindow, bars_to_origin, cut_window
from kronos_stream.commands._progress import progress_bar
from kronos_stream.forecast.fan import Fan
from kronos_stream.forecast.paths_file import paths_writer
from kronos_stream.forecast.quantiles import check_supported
from kronos_stream.forecast.table import print_fan
from kronos_stream.market.candle_files import CandleTable, read_candles
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.utc import rfc3339

if TYPE_CHECKING:
    from kronos_stream import Context, Forecaster
    from kronos_stream.forecast.paths_file import PathsWriter

PATHS_PER_BLOCK = 512
"""Paths sampled at a time: enough to fill the hardware, few enough to hold and to show progress."""

_SUFFIXES = re.compile(
    r"(\.(csv|txt|tsv|parquet|pq|feather|arrow|gz|bz2|xz|zip|zst))+$", re.IGNORECASE
)


def run(
    file: Path,
    *,
    model: str,
    horizon: int,
    paths: int,
    lookback: int,
    timeframe: Timeframe | None,
    series: str | None,
    at: int | None,
    quantiles: tuple[float, ...],
    plot: Path | None,
    out: Path | None,
    as_json: bool,
    loading: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Forecast ``file``. Raises click's errors and those that ``cli.main`` expects.

    loading: arguments of Forecaster.from_pretrained. sampling: arguments of Forecaster.sample.
    """
    _check_options(quantiles, paths, sampling)
    table = read_candles(file, timeframe)
    end = bars_to_origin(table, at)
    forecaster = _load(model, loading)
    window = cut_window(table, end, lookback, horizon, forecaster.max_context)
    name = series or _series_name(file)
    provenance = {
        "series": name,
        "timeframe": str(table.timeframe),
        "origin": rfc3339(window.origin),
        **_describe_model(model, forecaster),
        "sampling": {"paths": paths, **sampling, "noise": series or 0},
        "context": _describe_context(table, window),
    }
    closes = np.empty((paths, horizon), np.float32)
    context = _context(window, table, series)
    with _paths_file(out, name, window, provenance) as writer:
        for first, block in _blocks(forecaster, context, horizon, paths, sampling):
            closes[first : first + len(block)] = block[..., CLOSE]
            if writer:
                writer.write(block)
    last = float(window.values[-1, CLOSE])
    fan = Fan(name, table.timeframe, window.origin, last, window.future, closes, quantiles)
    caption = _caption(model, len(window.times), provenance["sampling"])
    if plot:
        from kronos_stream.forecast.plot import draw_fan

        with _report_write_errors(plot):
            draw_fan(plot, table, fan, caption)
    if as_json:
        report = {**provenance, **_figures(fan, window)}
        click.echo(json.dumps(report, indent=2, allow_nan=False))
    else:
        print_fan(fan, caption)


def _check_options(quantiles: tuple[float, ...], paths: int, sampling: dict[str, Any]) -> None:
    """Refuse bad options before any file is read and the model is loaded."""
    from kronos_stream.engine.sampling import Sampling

    try:
        check_supported(quantiles, paths)
    except ValueError as error:
        raise click.UsageError(f"{error}; raise --paths or change --quantiles") from None
    try:
        Sampling(sampling["temperature"], sampling["top_k"], sampling["top_p"])
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _load(model: str, loading: dict[str, Any]) -> Forecaster:
    with Console(stderr=True).status(f"loading {model}"):
        from kronos_stream import Forecaster

        try:
            return Forecaster.from_pretrained(model, **loading)
        except ValueError as error:
            raise click.UsageError(str(error)) from None


def _context(window: InputWindow, table: CandleTable, series: str | None) -> Context:
    from kronos_stream import Context

    return Context(
        window.values,
        window.times,
        series=series,
        timeframe=str(table.timeframe),
        future_times=window.future,
    )


def _blocks(
    forecaster: Forecaster, context: Context, horizon: int, paths: int, sampling: dict[str, Any]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Blocks of paths (n, horizon, 6), each with the number of its first; together as one call."""
    with progress_bar() as progress:
        task = progress.add_task("sampling paths", total=paths)
        for first in range(0, paths, PATHS_PER_BLOCK):
            count = min(PATHS_PER_BLOCK, paths - first)
            (block,) = forecaster.sample(
                [context], horizon=horizon, paths=count, first_path=first, **sampling
            )
            yield first, block
            progress.advance(task, count)


@contextmanager
def _paths_file(
    out: Path | None, series: str, window: InputWindow, provenance: dict[str, Any]
) -> Iterator[PathsWriter | None]:
    """The writer for --out, if it is given."""
    if out is None:
        yield None
        return
    with (
        _report_write_errors(out),
        paths_writer(
            out, series=series, origin=window.origin, times=window.future, settings=provenance
        ) as writer,
    ):
        yield writer


@contextmanager
def _report_write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror or error}") from None


def _series_name(file: Path) -> str:
    """The file's name without suffixes; bytes that are not UTF-8 are replaced."""
    return _SUFFIXES.sub("", os.fsencode(file.name).decode(errors="replace"))


def _caption(model: str, bars: int, sampling: dict[str, Any]) -> str:
    parts = [
        model,
        f"{bars} bars",
        f"{sampling['paths']} paths",
        f"T {sampling['temperature']:g}",
        *([f"top-k {sampling['top_k']}"] if sampling["top_k"] else []),
        *([f"top-p {sampling['top_p']:g}"] if sampling["top_p"] < 1 else []),
        f"seed {sampling['seed']}",
        "anchored" if sampling["anchor"] else "not anchored",
    ]
    return ", ".join(parts)


def _describe_model(model: str, forecaster: Forecaster) -> dict[str, Any]:
    loaded = forecaster.checkpoint
    return {
        "model": {
            "name": model,
            "revision": loaded and loaded.predictor.revision,
            "tokenizer": loaded and loaded.tokenizer.name,
            "tokenizer_revision": loaded and loaded.tokenizer.revision,
        },
        "engine": {
            "version": __version__,
            "device": str(forecaster.device),
            "dtype": str(forecaster.dtype).removeprefix("torch."),
        },
    }


def _describe_context(table: CandleTable, window: InputWindow) -> dict[str, Any]:
    amount = "reported" if table.has_amount else "derived"
    return {
        "bars": len(window.times),
        "first": rfc3339(int(window.times[0])),
        "missing": window.missing,
        "volume": "reported" if table.has_volume else None,
        "amount": amount if table.has_volume else None,
    }


def _figures(fan: Fan, window: InputWindow) -> dict[str, Any]:
    return {
        "last": dict(zip(CHANNELS[:5], window.values[-1].tolist(), strict=False)),
        "times": [rfc3339(time) for time in fan.times.tolist()],
        "close": fan.columns(),
        "summary": fan.summary().to_dict(),
    }
