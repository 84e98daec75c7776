"""Arguments of ``kronos-stream tail``; ``_tail``, imported only when it runs, does the work."""

from __future__ import annotations

from typing import Any

import click


@click.command(context_settings={"show_default": True})
@click.argument("bootstrap", metavar="[HOST:PORT]", required=False)
@click.option(
    "--series",
    multiple=True,
    metavar="NAME",
    help="Show only this series, such as binance:BTC/USDT:5m. May be given several times.",
)
@click.option(
    "--prefix",
    metavar="NAME",
    help="Prefix of the topic names. By default, KRONOS_STREAM_KAFKA__TOPIC_PREFIX, or kronos.",
)
@click.option("--from-start", is_flag=True, help="Start with the oldest forecast in the topic.")
@click.option("--newest", is_flag=True, help="Sort by time, newest first, not by name.")
@click.option("--plain", is_flag=True, help="Print a line per forecast, also on a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print complete messages as JSON lines.")
def tail(**options: Any) -> None:  # noqa: ANN401 - click has checked them
    """Show forecasts from Kafka as they arrive, in a live table with a row per series.

    HOST:PORT is a broker that needs neither encryption nor login. By default, the daemon's
    KRONOS_STREAM_KAFKA__* variables give the broker and the login. Ctrl-C ends it. Programs read
    forecasts with kronos_stream.client.
    """
    from kronos_stream.commands import _tail

    _tail.run(**options)
