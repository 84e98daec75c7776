"""The arguments of ``kronos-stream replay``; ``_replay``, imported late, does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from kronos_stream.market.utc import parse_time

Speed = float | Literal["max"]


def _parse_speed(_: click.Context, __: click.Parameter, text: str) -> Speed:
    if text == "max":
        return "max"
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not 0 < speed <= 1e6:
        raise click.BadParameter(f"{text!r}: expected max, or a number such as 1 or 60")
    return speed


def _parse_from(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    try:
        return None if text is None else parse_time(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--model", metavar="NAME|FOLDER", help="The predictor; 'nano' needs no network.")
@click.option("--lookback", type=click.IntRange(min=2), metavar="BARS", help="Bars per context.")
@click.option(
    "--speed",
    default="max",
    show_default=True,
    callback=_parse_speed,
    metavar="1|N|max",
    help="1: as it happened. N: so many times as fast; what takes too long is skipped, as it would "
    "be live. max: as fast as this machine can, and every bar is forecast.",
)
@click.option(
    "--from",
    "start",
    callback=_parse_from,
    metavar="TIME",
    help="Forecast the bars that close after TIME, such as 2024-06-18T11:15Z (no zone means UTC); "
    "those before are history. Left out: once a series has as many bars as a context takes.",
)
@click.option(
    "--bars",
    type=click.IntRange(min=1),
    metavar="N",
    help="End after N bars; those that close together count once.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Append the forecasts to FILE, one JSON object per line.",
)
@click.option(
    "--kafka",
    metavar="HOST:PORT,...",
    help="Send the forecasts to Kafka by these brokers. Readers may take them for expired.",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Keep the state: another replay goes on where this one ended. Left out, it is forgotten.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures at the end as JSON.")
def replay(**options: Any) -> None:  # noqa: ANN401 - click has checked them
    """Forecast recorded candles as if they were live: the whole daemon, on files.

    FILE is a candle file, as for the forecast command, or a capture of Binance's websocket frames
    (a line 'wss://... <-> epoch', then 'epoch seconds: frame' lines; may be gzipped). All files
    are played together, in the order of time. A candle file's name gives the symbol
    (ETH_BTC-5m.csv is replay:ETH/BTC:5m); SERIES=FILE says it, [venue:]symbol[:timeframe]. What
    a file lacks, the venue never had: such bars become synthetic, as they would live.

    Everything else is set as for the run command, by KRONOS_STREAM_* variables, but sinks are
    those named here alone.

    \b
    kronos-stream replay ETH_BTC-5m.csv.gz --model nano --lookback 96 --out forecasts.jsonl
    kronos-stream replay binance:BTC/USDT:1m=btc.parquet --speed 60 --kafka localhost:9092
    """  # noqa: D301 - click's mark for a paragraph to be left as it is
    from kronos_stream.commands import _replay

    _replay.run(_replay.Options(**options))
