"""Arguments of ``kronos-stream forecast``; ``_forecast``, imported late, does the work."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click

from kronos_stream.commands._parameters import ParsedType
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.utc import parse_time

_PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def _parse_probabilities(text: str) -> tuple[float, ...]:
    try:
        return tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise ValueError(f"{text!r}: expected numbers between 0 and 1, with commas") from None


def _parse_device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise ValueError(f"{text!r}: expected auto, cpu, mps, cuda or cuda:N")
    return text


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise ValueError(f"{text}: is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"{text}: no such folder")
    # The new file replaces an old one; as root that could be a device, such as /dev/null.
    if path.exists() and not path.is_file():
        raise ValueError(f"{text}: not an ordinary file")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{text}: its folder is not writable")
    return path


def _parse_series(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text!r}: not UTF-8") from None
    return text


def _plot_file(text: str) -> Path:
    path = _new_file(text)
    if path.suffix.lower() not in _PLOT_SUFFIXES:
        raise ValueError(f"{text}: expected a name ending in {', '.join(_PLOT_SUFFIXES)}")
    return path


@click.command(context_settings={"show_default": True})
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--model",
    default="NeoQuasar/Kronos-small",
    metavar="NAME|FOLDER",
    help="The predictor: a Hugging Face hub id, 'nano' (ships with the package, needs no "
    "network), or a folder with config.json and model.safetensors, or one with the sub-folders "
    "predictor and tokenizer.",
)
@click.option(
    "--tokenizer",
    metavar="NAME|FOLDER",
    help="The tokenizer that the predictor was trained with. Not needed for published models and "
    "for folders with sub-folders.",
)
@click.option(
    "--revision",
    metavar="COMMIT",
    help="Hub commit of the predictor. By default, the pinned commit of published models.",
)
@click.option(
    "--horizon",
    type=click.IntRange(min=1),
    default=24,
    metavar="BARS",
    help="Number of bars to forecast.",
)
@click.option(
    "--paths",
    type=click.IntRange(min=1),
    default=32,
    metavar="N",
    help="Number of sample paths. More paths give steadier quantiles: with m paths, quantiles from "
    "1/(m+1) to m/(m+1) exist, so a 90 % band needs 19. Paths are sampled in blocks, so thousands "
    "need no more memory.",
)
@click.option(
    "--lookback",
    type=click.IntRange(min=2),
    default=488,
    metavar="BARS",
    help="Number of bars up to the origin that the model sees. Clipped to the bars in the file and "
    "to --max-context minus --horizon.",
)
@click.option(
    "--max-context",
    type=click.IntRange(min=4),
    metavar="BARS",
    help="The model's window, past and future together. By default, the window it was trained on: "
    "512 bars for small and base, 2048 for mini.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    metavar="T",
    help="Sampling temperature: below 1 paths stay closer to the likeliest, above 1 they spread.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=0),
    default=0,
    metavar="K",
    help="Sample from the K likeliest tokens only; 0 means all, 1 the single greedy path. Applied "
    "before --top-p.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.9,
    metavar="P",
    help="Sample from the likeliest tokens whose probabilities add up to P; 1 means all.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**63 - 1),
    default=0,
    metavar="N",
    help="The same seed, series and origin give the same noise, on every machine.",
)
@click.option(
    "--anchor/--no-anchor",
    default=True,
    help="Scale the prices of each path by actual / decoded close of the origin bar, so that paths "
    "start at the last price instead of the tokenizer's approximation of it.",
)
@click.option(
    "--timeframe",
    type=ParsedType("timeframe", Timeframe.parse),
    metavar="5m|1h|1d|...",
    help="Length of a bar. By default, the most common distance between the bars of the file.",
)
@click.option(
    "--series",
    type=ParsedType("name", _parse_series),
    metavar="NAME",
    help="Name of the series, such as binance:BTC/USDT:5m. It is shown, stored in --out, and "
    "determines the noise. By default, the file's name is shown, and the noise is that of an "
    "unnamed series.",
)
@click.option(
    "--at",
    type=ParsedType("time", parse_time),
    metavar="TIME",
    help="The origin: open time of the last bar that the model sees, such as 2024-06-18T11:15Z "
    "(UTC if no zone is given). By default, the last bar of the file.",
)
@click.option(
    "--device",
    type=ParsedType("device", _parse_device),
    default="auto",
    metavar="auto|cpu|cuda|cuda:N|mps",
    help="Device to compute on; auto takes the fastest available.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    help="Number format; auto takes bfloat16 where the hardware multiplies it natively. float32 on "
    "the CPU gives bit-identical paths, whatever else is in the batch.",
)
@click.option(
    "--quantiles",
    type=ParsedType("quantiles", _parse_probabilities),
    default="0.05,0.25,0.5,0.75,0.95",
    metavar="P,P,...",
    help="Quantiles to show, as probabilities between 0 and 1. Each needs enough --paths.",
)
@click.option(
    "--plot",
    type=ParsedType("file", _plot_file),
    metavar="FILE",
    help="Draw the last candles and the fan of quantiles: .png, .svg or .pdf.",
)
@click.option(
    "--out",
    type=ParsedType("file", _new_file),
    metavar="FILE",
    help="Write every path, as sampled, to a Parquet file: one row per path and step. With many "
    "--paths, a generator of synthetic candles. The file is complete or does not appear.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def forecast(file: Path, out: Path | None, plot: Path | None, **options: Any) -> None:  # noqa: ANN401 - click has checked them
    """Forecast the candles in FILE: quantiles of the close for each of the next bars.

    FILE is CSV (also .gz, .zst), Parquet or Feather with the columns time, open, high, low, close
    and, optionally, volume and amount. Other common names are understood. Times are epoch numbers
    or ISO 8601 and mean the bar's open. Every bar must be complete; missing bars are reported.

    \b
    kronos-stream forecast btc-5m.csv
    kronos-stream forecast btc-5m.csv --model nano --horizon 8 --plot fan.png
    kronos-stream forecast btc-5m.csv --paths 10000 --out synthetic.parquet
    """  # noqa: D301 - \b is click's mark for a paragraph without re-wrapping
    if file.resolve() in {path.resolve() for path in (out, plot) if path}:
        raise click.UsageError(f"{file}: writing to it would destroy the input")
    if out and plot and out.resolve() == plot.resolve():
        raise click.UsageError(f"{out}: --out and --plot name the same file")
    from kronos_stream.commands._forecast import run

    loading = ("tokenizer", "revision", "device", "dtype", "max_context")
    sampling = ("temperature", "top_k", "top_p", "seed", "anchor")
    run(
        file,
        out=out,
        plot=plot,
        loading={name: options.pop(name) for name in loading},
        sampling={name: options.pop(name) for name in sampling},
        **options,
    )
