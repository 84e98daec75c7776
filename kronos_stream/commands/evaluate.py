"""``kronos-stream evaluate``: a model against a random walk, on files or generated markets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kronos_stream.engine import Forecaster
    from kronos_stream.evaluation.cases import Case, ForecastFunction
    from kronos_stream.evaluation.walk_forward import Report

_GENERATED = "generated"


@click.command()
@click.argument("data", nargs=-1, required=True)
@click.option("--model", default="nano", show_default=True, help="Name, folder or hub id.")
@click.option("--tokenizer", default=None, help="The model's tokenizer, where it is not known.")
@click.option("--horizon", default=12, show_default=True, help="Bars ahead, 2 or more.")
@click.option("--paths", default=32, show_default=True, help="Paths of each forecast, 19 or more.")
@click.option("--lookback", default=232, show_default=True, help="Bars known (files).")
@click.option(
    "--stride",
    type=click.IntRange(1),
    default=12,
    show_default=True,
    help="Bars between origins (files).",
)
@click.option("--count", default=2304, show_default=True, help="Forecasts (generated markets).")
@click.option(
    "--truth",
    default=32,
    show_default=True,
    help="Futures from a generated market's own state, to compare with; 0: none.",
)
@click.option(
    "--timeframes",
    default="1m,5m,15m,1h,4h,1d",
    show_default=True,
    help="Bar lengths of generated markets.",
)
@click.option("--seed", default=0, show_default=True, help="Of the noise and the markets.")
@click.option(
    "--anchor/--no-anchor",
    default=True,
    show_default=True,
    help="Scale paths by actual over decoded last close.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Write all figures to this file.",
)
def evaluate(
    data: tuple[str, ...],
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
    *,
    anchor: bool,
    device: str,
    json_file: Path | None,
) -> None:
    """Walk a model forward over DATA (files, or 'generated') and score it.

    Fair CRPS by horizon step, coverage of the 50, 80 and 90 % bands and the error of the
    forecast volatility, against random walks and the last value; intervals of 95 % by block
    bootstrap over time.
    """
    from kronos_stream.engine import Forecaster
    from kronos_stream.evaluation.cases import file_cases
    from kronos_stream.evaluation.generated_cases import generated_cases
    from kronos_stream.evaluation.walk_forward import evaluate as score
    from kronos_stream.model.checkpoint import find_model, load_tokenizer
    from kronos_stream.training.reconstruction import reconstruction

    if paths < 19 or horizon < 2:
        raise click.UsageError("90 % bands need --paths 19 or more, volatility --horizon 2")
    began = time.monotonic()
    forecaster = Forecaster.from_pretrained(model, tokenizer, device=device)

    def cases(truth_paths: int) -> Iterator[Case]:
        if data == (_GENERATED,):
            return generated_cases(
                timeframes.split(","),
                count=count,
                horizon=horizon,
                seed=seed,
                truth_paths=truth_paths,
            )
        files = [Path(name) for name in data]
        return file_cases(files, lookback=lookback, horizon=horizon, stride=stride)

    try:
        report = score(
            cases(truth),
            forecast_function(forecaster, seed=seed, anchor=anchor),
            paths=paths,
            model=model,
            seed=seed,
        )
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    codec_at = find_model(model, tokenizer).tokenizer
    codec = reconstruction(load_tokenizer(codec_at.name, codec_at.revision), cases(0), seed=seed)
    for line in (*report_lines(report), *_codec_lines(codec.to_dict())):
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
        _write_json(json_file, document)


def forecast_function(
    forecaster: Forecaster, *, seed: int = 0, anchor: bool = True
) -> ForecastFunction:
    """A Forecaster as what :func:`kronos_stream.evaluation.walk_forward.evaluate` calls."""
    from kronos_stream.engine import Context

    def forecast(histories: Sequence[Any], horizon: int, paths: int) -> list[Any]:
        contexts = [
            Context(h.values, h.times, series=h.series, timeframe=h.timeframe) for h in histories
        ]
        return list(
            forecaster.sample(contexts, horizon=horizon, paths=paths, seed=seed, anchor=anchor)
        )

    return forecast


def report_lines(report: Report) -> list[str]:
    """The report as lines of text."""
    names = list(report.crps_ratio)
    lines = [
        f"{report.model}: {report.cases} forecasts in {report.blocks} blocks of time",
        "",
        "fair CRPS, as a share of another's (below 1: better)",
        "step    " + "".join(f"{name:>28}" for name in names),
    ]
    for step in range(report.horizon):
        row = "".join(f"{report.crps_ratio_by_step[name][step]!s:>28}" for name in names)
        lines.append(f"{step + 1:<8}{row}")
    lines.append("all     " + "".join(f"{report.crps_ratio[name]!s:>28}" for name in names))
    lines.append("")
    lines.append("coverage   " + "   ".join(f"{k}: {v}" for k, v in report.coverage.items()))
    mae = ", ".join(f"{name} {value:.4f}" for name, value in report.volatility_mae.items())
    lines.append(f"volatility MAE: {mae}")
    lines.append(
        "  as a share: " + ", ".join(f"{k} {v}" for k, v in report.volatility_ratio.items())
    )
    return lines


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


def _write_json(path: Path, document: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(document, indent=2) + "\n")
        part.replace(path)
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror or error}") from None
