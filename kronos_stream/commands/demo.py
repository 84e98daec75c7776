"""The arguments of ``kronos-stream demo``; ``_demo``, imported late, does the work."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(context_settings={"show_default": True})
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    metavar="N",
    help="End by itself N seconds after the first forecast. Left out: until Ctrl-C.",
)
@click.option(
    "--symbols", type=click.IntRange(1, 2_000), default=20, metavar="N", help="Made-up markets."
)
@click.option("--timeframe", default="1s", metavar="LENGTH", help="Length of the bars.")
@click.option(
    "--candles",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Candles that the simulated exchange serves instead, as if they happened now, one bar "
    "per bar's length; see exchange --help. May be given several times.",
)
@click.option("--seed", type=int, default=0, metavar="N", help="Of the made-up markets.")
@click.option(
    "--faults",
    default="none",
    metavar="PRESET|JSON",
    help="What goes wrong at the exchange; see exchange --help.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures at the end as JSON.")
def demo(
    seconds: float | None,
    symbols: int,
    timeframe: str,
    candles: tuple[Path, ...],
    seed: int,
    faults: str,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Show forecasts flowing: a simulated exchange, the daemon with nano, and a Kafka broker.

    All in one go on this machine, without a network. The exchange speaks Binance's protocol and
    the daemon follows it as it would the real one; the broker is an embedded one that real
    clients can read from, by the command that is printed.
    """
    from kronos_stream.commands import _demo

    _demo.run(
        _demo.Options(
            seconds=seconds,
            symbols=symbols,
            timeframe=timeframe,
            candles=candles,
            seed=seed,
            faults=faults,
            as_json=as_json,
        )
    )
