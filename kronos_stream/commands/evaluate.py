"""Arguments of ``kronos-stream evaluate``; ``_evaluate``, imported late, does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command(context_settings={"show_default": True})
@click.argument("data", nargs=-1, required=True)
@click.option("--model", default="nano", help="Name, folder or hub id of the model.")
@click.option("--tokenizer", help="The model's tokenizer, unless it is known from the model.")
@click.option("--horizon", default=12, help="Bars to forecast, at least 2.")
@click.option("--paths", default=32, help="Sample paths per forecast, at least 19.")
@click.option("--lookback", default=232, help="Past bars per forecast, for files.")
@click.option(
    "--stride", type=click.IntRange(1), default=12, help="Bars between origins, for files."
)
@click.option("--count", default=2304, help="Number of forecasts, for generated markets.")
@click.option(
    "--truth",
    default=32,
    help="Futures simulated from the state of a generated market, for comparison; 0: none.",
)
@click.option(
    "--timeframes",
    default="1m,5m,15m,1h,4h,1d",
    help="Bar lengths of generated markets.",
)
@click.option("--seed", default=0, help="Seed of the noise and of generated markets.")
@click.option(
    "--anchor/--no-anchor",
    default=True,
    help="Scale the prices of each path by actual / decoded close of the origin bar.",
)
@click.option("--device", default="auto", help="cpu, cuda or auto.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write all figures to this file.",
)
def evaluate(paths: int, horizon: int, **options: Any) -> None:  # noqa: ANN401 - click has checked them
    """Score a model's forecasts along DATA: candle files, or 'generated' for generated markets.

    Reports fair CRPS by horizon step, coverage of the 50, 80 and 90 % bands, and the error of the
    forecast volatility, in comparison with random walks and the last value, with 95 % intervals
    from a block bootstrap over time.
    """
    if paths < 19 or horizon < 2:
        raise click.UsageError("90 % bands need --paths 19 or more, volatility --horizon 2 or more")
    from kronos_stream.commands import _evaluate

    _evaluate.run(paths=paths, horizon=horizon, **options)
