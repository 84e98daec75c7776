"""Arguments of ``kronos-stream demo``; ``_demo``, imported only when it runs, does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command(context_settings={"show_default": True})
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    metavar="N",
    help="Stop N seconds after the first forecast. By default, run until Ctrl-C.",
)
@click.option(
    "--symbols",
    type=click.IntRange(1, 2_000),
    default=20,
    metavar="N",
    help="Number of simulated markets.",
)
@click.option("--timeframe", default="1s", metavar="LENGTH", help="Length of the bars.")
@click.option(
    "--candles",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Serve the candles of FILE instead of simulated markets, one bar per --timeframe, as if "
    "they happened now; see exchange --help. May be given several times.",
)
@click.option("--seed", type=int, default=0, metavar="N", help="Seed of the simulated markets.")
@click.option(
    "--faults",
    default="none",
    metavar="PRESET|JSON",
    help="Faults of the exchange; see exchange --help.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the final figures as JSON.")
def demo(**options: Any) -> None:  # noqa: ANN401 - click has checked them
    """Run a live demo: a simulated exchange, the daemon with the model nano, and a Kafka broker.

    Everything runs on this machine, without a network. The exchange speaks Binance's protocol, so
    the daemon uses its normal Binance connector; the embedded broker accepts any Kafka client.
    The demo prints commands that read the forecasts.
    """
    from kronos_stream.commands import _demo

    _demo.run(**options)
