"""``kronos-stream run``: the daemon, told by the environment."""

from __future__ import annotations

import click


class _RunCommand(click.Command):
    """Its help lists the settings, from where they are defined."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from kronos_stream.daemon.config.environment import describe_settings

        super().format_options(ctx, formatter)
        with formatter.section("Environment"):
            formatter.write_dl(
                [
                    (
                        one.name,
                        f"{one.description} [{one.default}]" if one.default else one.description,
                    )
                    for one in describe_settings()
                ]
            )


@click.command(cls=_RunCommand)
@click.option(
    "--check",
    is_flag=True,
    help="Check the settings, the venues' symbols and the model, then exit.",
)
def run(check: bool) -> None:  # noqa: FBT001
    """Forecast live candles at every bar close, until stopped.

    Everything is set by environment variables, listed below; a secret may be given in a file,
    by the variable's name with _FILE at its end. At least KRONOS_STREAM_SYMBOLS and
    KRONOS_STREAM_SINKS are needed:

    \b
      export KRONOS_STREAM_SYMBOLS=binance:BTC/USDT,binance:ETH/USDT
      export KRONOS_STREAM_TIMEFRAMES=1m,5m
      export KRONOS_STREAM_SINKS=kafka
      export KRONOS_STREAM_KAFKA__BOOTSTRAP_SERVERS=localhost:9092
      kronos-stream run

    KRONOS_STREAM_ROLE splits the work: ingest takes candles in and writes them to Kafka (symbols,
    timeframes and brokers are needed), forecast reads them there as one of a group (timeframes,
    sinks and brokers).

    SIGTERM or Ctrl-C: no more candles are taken in, the batch in hand is finished and delivered;
    a second one ends at once, and nothing is lost. SIGHUP reads the symbols file again.
    """  # noqa: D301 - click's mark for a paragraph to be left as it is
    import asyncio
    import os
    import signal

    # Until the daemon takes it, it must not end us: whoever reloads does not know how far we are.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    from kronos_stream.daemon import service
    from kronos_stream.daemon.config.environment import read_settings
    from kronos_stream.daemon.telemetry.logs import configure

    settings = read_settings(os.environ)
    configure(settings.log.format, settings.log.level)
    if check:
        click.echo(asyncio.run(service.check(settings)))
    else:
        asyncio.run(service.serve(service.build_role(settings)))
