"""Arguments of ``kronos-stream exchange``; ``_exchange``, imported late, does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kronos_stream.commands._parameters import ParsedType
from kronos_stream.market.timeframe import Timeframe


def _parse_timeframes(text: str) -> list[str]:
    return [str(Timeframe.parse(part.strip())) for part in text.split(",") if part.strip()]


@click.command(context_settings={"show_default": True})
@click.option(
    "--symbols",
    type=click.IntRange(min=0),
    default=20,
    metavar="N",
    help="Number of simulated spot markets: SIM00USDT, SIM01USDT and so on.",
)
@click.option(
    "--perpetuals",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Number of simulated USD-M perpetuals, with the same names and their own candles.",
)
@click.option(
    "--timeframe",
    "timeframes",
    default="",
    show_default="1s, or the interval of the candles",
    type=ParsedType("list", _parse_timeframes),
    metavar="LENGTH,...",
    help="Intervals to offer, as one list separated by commas, such as 1s,1m; bars of the longer "
    "ones are composed of the shortest.",
)
@click.option(
    "--candles",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Replay candles from FILE in a loop, as if they happened now; at most the first half is "
    "history. One file per market, named after it: BTCUSDT-5m.csv. May be given several times.",
)
@click.option("--seed", type=int, default=0, metavar="N", help="Seed of the markets and faults.")
@click.option(
    "--speed",
    type=click.FloatRange(min=0.01, max=10_000),
    default=1.0,
    metavar="X",
    help="Speed of the exchange's clock, relative to real time.",
)
@click.option(
    "--history",
    type=click.IntRange(min=1),
    default=600,
    metavar="BARS",
    help="Bars of the longest interval that exist at the start.",
)
@click.option(
    "--faults",
    default="none",
    metavar="PRESET|JSON",
    help="Faults to simulate: none, connections, rollover, quiet, dirty, gaps, rest, skewed, "
    'rough, random, or JSON such as {"drop": 60, "missing_final": 0.1}.',
)
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(min=0, max=65_535),
    default=0,
    metavar="N",
    help="Port to listen on; 0 takes any free port.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the addresses as one line of JSON.")
@click.option(
    "--with-parent",
    is_flag=True,
    help="Stop when standard input closes, as a pipe does when the process at its other end ends.",
)
def exchange(**options: Any) -> None:  # noqa: ANN401 - click has checked them
    """Run a simulated exchange with Binance's protocol, for spot and USD-M futures.

    Markets are generated from a seed or replayed from files, with faults on request. Point any
    client of Binance's public market data at the URLs it prints: REST and websockets, spot and
    futures, share one port (futures' websockets are under /market). It needs no network. Ctrl-C
    stops it.
    """
    from kronos_stream.commands import _exchange

    _exchange.run(**options)
