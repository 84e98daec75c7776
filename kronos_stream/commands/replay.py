"""Arguments of ``kronos-stream replay``; ``_replay``, imported only when it runs, does the work."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import click

from kronos_stream.commands._parameters import ParsedType
from kronos_stream.market.utc import parse_time


def _parse_speed(text: str) -> float:
    """Times as fast as the recording; inf for max."""
    if text == "max":
        return inf
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not 0 < speed <= 1e6:
        raise ValueError(f"{text!r}: expected max, or a number such as 1 or 60")
    return speed


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--model",
    metavar="NAME|FOLDER",
    help="The predictor; 'nano' needs no network. By default, KRONOS_STREAM_MODEL, or "
    "NeoQuasar/Kronos-small.",
)
@click.option(
    "--lookback",
    type=click.IntRange(min=2),
    metavar="BARS",
    help="Bars per context. By default, KRONOS_STREAM_LOOKBACK, or 488.",
)
@click.option(
    "--speed",
    default="max",
    show_default=True,
    type=ParsedType("speed", _parse_speed),
    metavar="1|N|max",
    help="1: in real time. N: N times as fast; bars that take too long are skipped, as in live "
    "operation. max: as fast as this machine can, without skipping any bar.",
)
@click.option(
    "--from",
    "start",
    type=ParsedType("time", parse_time),
    metavar="TIME",
    help="Forecast the bars that close after TIME, such as 2024-06-18T11:15Z (UTC if no zone is "
    "given); earlier bars are history. By default, start when a series has enough bars for a "
    "context.",
)
@click.option(
    "--bars",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stop after N bars; bars that close at the same time count once.",
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
    help="Send the forecasts to the Kafka cluster with these brokers. Readers may ignore them as "
    "expired.",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Keep the state in FILE, so that a later replay continues where this one ended. By "
    "default, it is discarded.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the final figures as JSON.")
def replay(**options: Any) -> None:  # noqa: ANN401 - click has checked them
    """Forecast recorded candles as if they were live, with the complete daemon.

    FILE is a candle file, as for the forecast command, or a capture of Binance websocket frames
    (a line 'wss://... <-> epoch', then lines 'epoch seconds: frame'; may be gzipped). All files
    are played together in chronological order. The name of a candle file gives the symbol
    (ETH_BTC-5m.csv is replay:ETH/BTC:5m); SERIES=FILE sets it explicitly, as
    [venue:]symbol[:timeframe]. Bars that a file lacks become synthetic, as in live operation.

    All other settings are KRONOS_STREAM_* variables, as for the run command, except that
    forecasts go only to the sinks given here.

    \b
    kronos-stream replay ETH_BTC-5m.csv.gz --model nano --lookback 96 --out forecasts.jsonl
    kronos-stream replay binance:BTC/USDT:1m=btc.parquet --speed 60 --kafka localhost:9092
    kronos-stream replay captures/*.txt.gz --model nano --out forecasts.jsonl
    """  # noqa: D301 - \b is click's mark for a paragraph without re-wrapping
    from kronos_stream.commands import _replay

    _replay.run(**options)
