"""``kronos-stream watch``: forecasts from Kafka, a line each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kronos_stream.forecast.message import Forecast


@click.command(context_settings={"show_default": True})
@click.argument("bootstrap", metavar="HOST:PORT")
@click.option(
    "--series",
    multiple=True,
    metavar="NAME",
    help="Only this series, such as binance:BTC/USDT:5m. May be given several times.",
)
@click.option("--prefix", default="kronos", metavar="NAME", help="Of the topics' names.")
@click.option("--from-start", is_flag=True, help="Also what was published before.")
@click.option("--json", "as_json", is_flag=True, help="Print whole records.")
def watch(
    bootstrap: str,
    series: tuple[str, ...],
    prefix: str,
    from_start: bool,  # noqa: FBT001
    as_json: bool,  # noqa: FBT001
) -> None:
    """Print forecasts as they come, until Ctrl-C.

    HOST:PORT is a Kafka broker without authentication; for others, and for bots, there is
    kronos_stream.client, of which this is an example.
    """
    import asyncio

    from aiokafka.errors import KafkaError

    from kronos_stream.client import forecasts

    click.echo(f"Reading {prefix}.forecasts.v1 at {bootstrap}; Ctrl-C ends", err=True)

    async def read() -> None:
        stream = forecasts(
            bootstrap,
            series=series or None,
            topic_prefix=prefix,
            start="earliest" if from_start else "latest",
            expired=from_start,
        )
        async for forecast in stream:
            click.echo(forecast.encode().decode() if as_json else _line(forecast))

    try:
        asyncio.run(read())
    except KafkaError as error:
        raise click.ClickException(str(error)) from error


def _line(forecast: Forecast) -> str:
    """Final close: its median, its outermost bands, and the chance that it is up."""
    names = sorted(name for name in forecast.close if name != "mean")
    low, high = forecast.close[names[0]][-1], forecast.close[names[-1]][-1]
    middle = forecast.close.get("q50", forecast.close["mean"])[-1]
    return (
        f"{forecast.origin:%Y-%m-%d %H:%M:%S}  {forecast.series}  last {forecast.last.close:.6g}  "
        f"in {len(forecast.times)} bars {middle:.6g} ({names[0]} {low:.6g}, {names[-1]} {high:.6g})"
        f"  P(up) {forecast.summary.p_up:.2f}" + ("  degraded" if forecast.degraded else "")
    )
