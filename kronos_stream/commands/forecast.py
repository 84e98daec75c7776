"""The arguments of ``kronos-stream forecast``; ``_forecast``, imported late, does the work."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click

from kronos_stream.commands._forecast_arguments import ForecastArguments
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.utc import parse_time

_PLOT_SUFFIXES = (".png", ".svg", ".pdf")


class _ParsedType(click.ParamType[Any]):
    """A value that a function reads from text; its ValueError is the message."""

    def __init__(self, name: str, parse: Any) -> None:  # noqa: ANN401
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _parse_probabilities(text: str) -> tuple[float, ...]:
    try:
        return tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise ValueError(f"{text!r}: expected numbers between 0 and 1 with commas") from None


def _parse_device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise ValueError(f"{text!r}: expected auto, cpu, mps, cuda or cuda:N")
    return text


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise ValueError(f"{text}: a folder")
    if not path.parent.is_dir():
        raise ValueError(f"{text}: no such folder")
    # The new file takes the old one's place: never a device's, which root could.
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
    help="The tokenizer the predictor was trained with. Known by itself for published models "
    "and for folders with sub-folders.",
)
@click.option(
    "--revision",
    metavar="COMMIT",
    help="Hub commit of the predictor. Left out, a pinned one where we know it.",
)
@click.option(
    "--horizon",
    type=click.IntRange(min=1),
    default=24,
    metavar="BARS",
    help="How many bars ahead to forecast.",
)
@click.option(
    "--paths",
    type=click.IntRange(min=1),
    default=32,
    metavar="N",
    help="How many futures to draw. More paths, steadier quantiles: m paths reach from 1/(m+1) to "
    "m/(m+1), so a 90 % band needs 19. Drawn in blocks, so thousands need no more memory.",
)
@click.option(
    "--lookback",
    type=click.IntRange(min=2),
    default=488,
    metavar="BARS",
    help="How many bars up to the origin the model sees. Clipped to what the file has and to "
    "--max-context less --horizon.",
)
@click.option(
    "--max-context",
    type=click.IntRange(min=4),
    metavar="BARS",
    help="The model's window, past and future together. Left out, what the model was trained on: "
    "512 bars for small and base, 2048 for mini.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    metavar="T",
    help="Below 1 the paths keep to what is likely, above 1 they spread.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=0),
    default=0,
    metavar="K",
    help="Draw among the K likeliest tokens only; 0 means all, 1 the single greedy path. Applied "
    "before --top-p.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.9,
    metavar="P",
    help="Draw among the likeliest tokens that together hold this probability; 1 means all.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**63 - 1),
    default=0,
    metavar="N",
    help="The same seed, series and origin draw the same noise, on every machine.",
)
@click.option(
    "--anchor/--no-anchor",
    default=True,
    help="Scale each path's prices by actual / decoded close of the origin bar. It takes out the "
    "tokenizer's rounding there, so that paths start at the last price; off is the raw model.",
)
@click.option(
    "--timeframe",
    type=_ParsedType("timeframe", Timeframe.parse),
    metavar="5m|1h|1d|...",
    help="Length of a bar. Left out, the most common distance between the file's bars.",
)
@click.option(
    "--series",
    type=_ParsedType("name", _parse_series),
    metavar="NAME",
    help="Name of the series, such as binance:BTC/USDT:5m. It is shown, stored in --out, and keys "
    "the noise. Left out, the file's name is shown and the noise is that of an unnamed series.",
)
@click.option(
    "--at",
    type=_ParsedType("time", parse_time),
    metavar="TIME",
    help="The origin: open time of the last bar the model may see, such as 2024-06-18T11:15Z (no "
    "zone means UTC). Left out, the file's last bar.",
)
@click.option(
    "--device",
    type=_ParsedType("device", _parse_device),
    default="auto",
    metavar="auto|cpu|cuda|cuda:N|mps",
    help="Where to compute; auto takes the fastest there is.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    help="Number format; auto takes bfloat16 where the hardware multiplies it natively. float32 on "
    "the CPU gives the same bits in any company.",
)
@click.option(
    "--quantiles",
    type=_ParsedType("quantiles", _parse_probabilities),
    default="0.05,0.25,0.5,0.75,0.95",
    metavar="P,P,...",
    help="Probabilities to show, between 0 and 1. Those that so few paths cannot support are "
    "refused.",
)
@click.option(
    "--plot",
    type=_ParsedType("file", _plot_file),
    metavar="FILE",
    help="Draw the last candles and the fan of quantiles: .png, .svg or .pdf.",
)
@click.option(
    "--out",
    type=_ParsedType("file", _new_file),
    metavar="FILE",
    help="Write every path, unrepaired, as Parquet: one row per path and step. With many --paths "
    "this is a generator of synthetic candles. The file appears whole or not at all.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def forecast(**options: Any) -> None:  # noqa: ANN401 - click has checked them
    """Forecast the candles in FILE: quantiles of the close for each of the next bars.

    FILE is CSV (also .gz, .zst), Parquet or Feather with the columns time, open, high, low, close
    and, if it has them, volume and amount. Usual other names are understood; times are epoch
    numbers or ISO 8601 and mean the bar's open. No bar may be missing a number; whole bars may
    be missing, which is said.

    \b
    kronos-stream forecast btc-5m.csv
    kronos-stream forecast btc-5m.csv --model nano --horizon 8 --plot fan.png
    kronos-stream forecast btc-5m.csv --paths 10000 --out synthetic.parquet
    """  # noqa: D301 - click's mark for a paragraph to be left as it is
    request = ForecastArguments(**options)
    _refuse_overwriting(request)
    from kronos_stream.commands._forecast import run

    run(request)


def _refuse_overwriting(request: ForecastArguments) -> None:
    """The input and the two outputs are three files."""
    out = request.out and request.out.resolve()
    plot = request.plot and request.plot.resolve()
    if request.file.resolve() in (out, plot):
        raise click.UsageError(f"{request.file}: writing to it would destroy the input")
    if out and out == plot:
        raise click.UsageError(f"{request.out}: --out and --plot name the same file")
