"""Implementation of ``kronos-stream evaluate``: score a model on files or generated markets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from kronos_stream.atomic import atomic_write
from kronos_stream.commands._generated_cases import generated_cases
from kronos_stream.engine import Context, Forecaster
from kronos_stream.evaluation.cases import Case, ForecastFunction, History, file_cases
from kronos_stream.evaluation.walk_forward import Report, evaluate
from kronos_stream.model.checkpoint import find_model, load_tokenizer
from kronos_stream.training.reconstruction import reconstruction

_GENERATED = "generated"


def run(
    data: tuple[str, ...],
    *,
    model: str,
    tokenizer: str | None,
    horizon: int,
    paths: int,
    lookback: int,
    stride: int,
    count: int,
    truth: int,
    timeframes: str,
    seed: int,
    anchor: bool,
    device: str,
    json_file: Path | None,
) -> None:
    """Score the model and its tokenizer, and print or write the figures."""
    began = time.monotonic()
    forecaster = Forecaster.from_pretrained(model, tokenizer, device=device)

    def cases(truth_paths: int) -> Iterator[Case]:
        if data == (_GENERATED,):
            lengths = timeframes.split(",")
            return generated_cases(
                lengths, count=count, horizon=horizon, seed=seed, truth_paths=truth_paths
            )
        files = [Path(name) for name in data]
        return file_cases(files, lookback=lookback, horizon=horizon, stride=stride)

    forecast = forecast_function(forecaster, seed=seed, anchor=anchor)
    try:
        report = evaluate(cases(truth), forecast, paths=paths, model=model, seed=seed)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    location = find_model(model, tokenizer).tokenizer
    codec = reconstruction(load_tokenizer(location.name, location.revision), cases(0), seed=seed)
    for line in (*_report_lines(report), *_codec_lines(codec.to_dict())):
        click.echo(line)
    click.echo(f"{time.monotonic() - began:.0f} s")
    if json_file is not None:
        document = {
            "data": list(data),
            "paths": paths,
            "anchor": anchor,
            "seed": seed,
            "forecast": report.to_dict(),
            "reconstruction": codec.to_dict(),
        }
        try:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(json_file) as part:
                part.write_text(json.dumps(document, indent=2) + "\n")
        except OSError as error:
            raise click.ClickException(f"{json_file}: {error.strerror or error}") from None


def forecast_function(
    forecaster: Forecaster, *, seed: int = 0, anchor: bool = True
) -> ForecastFunction:
    """Adapt ``forecaster`` for :func:`kronos_stream.evaluation.walk_forward.evaluate`."""

    def forecast(
        histories: Sequence[History], horizon: int, paths: int
    ) -> list[NDArray[np.floating]]:
        contexts = [
            Context(h.values, h.times, series=h.series, timeframe=h.timeframe) for h in histories
        ]
        return list(forecaster.sample(contexts, horizon, paths, seed=seed, anchor=anchor))

    return forecast


def _report_lines(report: Report) -> list[str]:
    def row(label: object, cells: Iterator[object]) -> str:
        return f"{label!s:<8}" + "".join(f"{cell!s:>28}" for cell in cells)

    names = list(report.crps_ratio)
    mae = ", ".join(f"{name} {value:.4f}" for name, value in report.volatility_mae.items())
    ratios = ", ".join(f"{name} {ratio}" for name, ratio in report.volatility_ratio.items())
    return [
        f"{report.model}: {report.cases} forecasts in {report.blocks} blocks of time",
        "",
        "fair CRPS, relative to that of other forecasts (below 1: the model is better)",
        row("step", iter(names)),
        *(
            row(step + 1, (report.crps_ratio_by_step[name][step] for name in names))
            for step in range(report.horizon)
        ),
        row("all", (report.crps_ratio[name] for name in names)),
        "",
        "coverage   " + "   ".join(f"{level}: {share}" for level, share in report.coverage.items()),
        f"volatility MAE: {mae}",
        f"  relative to others: {ratios}",
    ]


def _codec_lines(codec: dict[str, Any]) -> list[str]:
    def text(name: str) -> str:
        part = codec[name]
        return f"{part['value']:.5f} [{part['low']:.5f}, {part['high']:.5f}]"

    ratio = codec["coarse"]["value"] / codec["full"]["value"]
    book = codec["codebook"]
    errors = (
        f"price reconstruction, share of variance: full {text('full')}, coarse {text('coarse')}, "
        f"coarse / full {ratio:.2f}"
    )
    usage = (
        f"codebook: s1 {book['s1_used']:.0%} of codes, perplexity {book['s1_perplexity']:.0f}; "
        f"s2 {book['s2_used']:.0%}, {book['s2_perplexity']:.0f}; joint perplexity "
        f"{book['joint_perplexity']:.0f}; dead bits {book['dead_bits']}"
    )
    return [errors, usage]
