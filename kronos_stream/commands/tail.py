"""The arguments of ``kronos-stream tail``; ``_tail``, imported late, does the work."""

from __future__ import annotations

import click


@click.command(context_settings={"show_default": True})
@click.argument("bootstrap", metavar="[HOST:PORT]", required=False)
@click.option(
    "--series",
    multiple=True,
    metavar="NAME",
    help="Only this series, such as binance:BTC/USDT:5m. May be given several times.",
)
@click.option(
    "--prefix",
    metavar="NAME",
    help="Of the topics' names. Left out: KRONOS_STREAM_KAFKA__TOPIC_PREFIX, or kronos.",
)
@click.option("--from-start", is_flag=True, help="Also what was published before.")
@click.option("--newest", is_flag=True, help="Newest forecast first; else in order of names.")
@click.option("--plain", is_flag=True, help="A line per forecast, as without a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print whole records.")
def tail(
    bootstrap: str | None,
    series: tuple[str, ...],
    prefix: str | None,
    from_start: bool,  # noqa: FBT001
    newest: bool,  # noqa: FBT001
    plain: bool,  # noqa: FBT001
    as_json: bool,  # noqa: FBT001
) -> None:
    """Show forecasts from Kafka as they come: a live table, a row per series. Ctrl-C ends it.

    HOST:PORT is a broker without encryption and login. Left out, it is read where and as whom the
    daemon writes: KRONOS_STREAM_KAFKA__BOOTSTRAP_SERVERS and so on. Bots have kronos_stream.client.
    """
    from kronos_stream.commands import _tail

    _tail.run(
        _tail.Options(
            bootstrap=bootstrap,
            series=series,
            prefix=prefix,
            from_start=from_start,
            newest=newest,
            plain=plain,
            as_json=as_json,
        )
    )
