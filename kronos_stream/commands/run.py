"""``kronos-stream run``: the daemon, configured by environment variables."""

from __future__ import annotations

from textwrap import TextWrapper
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kronos_stream.daemon.config.settings import Settings


_NAME_COLUMNS = 30


class _RunCommand(click.Command):
    """A command whose help lists the daemon's settings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from kronos_stream.daemon.config.reference import describe_settings

        super().format_options(ctx, formatter)
        rows = []
        for setting in describe_settings():
            default = f" [{setting.default}]" if setting.default else ""
            rows.append((setting.name, setting.description + default))
        with formatter.section("Environment"):
            _write_definitions(formatter, rows)


def _write_definitions(formatter: click.HelpFormatter, rows: list[tuple[str, str]]) -> None:
    """Write rows as click does, but break lines only at spaces: values must stay copyable."""
    margin = " " * formatter.current_indent
    indent = margin + " " * (_NAME_COLUMNS + 2)
    wrapper = TextWrapper(
        max(formatter.width, 2 * len(indent)),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    for name, description in rows:
        text = wrapper.fill(description)
        start = margin + name
        rest = text[len(start) :] if len(name) <= _NAME_COLUMNS else f"\n{text}"
        formatter.write(f"{start}{rest}\n")


@click.command(cls=_RunCommand)
@click.option(
    "--check",
    is_flag=True,
    help="Check the settings, the venues' symbols and the model, then exit; doctor checks more.",
)
def run(check: bool) -> None:  # noqa: FBT001
    """Forecast live candles at every bar close, until stopped.

    All settings are environment variables, listed below. A secret may be in a file: append _FILE
    to the variable's name and give the path. KRONOS_STREAM_SYMBOLS and KRONOS_STREAM_SINKS are
    required:

    \b
      export KRONOS_STREAM_SYMBOLS=binance:BTC/USDT,binance:ETH/USDT
      export KRONOS_STREAM_TIMEFRAMES=1m,5m
      export KRONOS_STREAM_SINKS=kafka
      export KRONOS_STREAM_KAFKA__BOOTSTRAP_SERVERS=localhost:9092
      kronos-stream run

    KRONOS_STREAM_ROLE divides the work between processes: ingest receives candles and writes them
    to Kafka (requires symbols, timeframes and brokers); forecast, one of a consumer group, reads
    them from there (requires timeframes, sinks and brokers).

    SIGTERM and Ctrl-C stop it: it receives no more candles, finishes the current batch and delivers
    it. A second signal stops it immediately, without loss of data. SIGHUP reloads the symbols file.
    """  # noqa: D301 - \b is click's mark for a paragraph without re-wrapping
    import asyncio
    import os
    import signal

    # A SIGHUP before the daemon handles it must not end the process.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    from kronos_stream.daemon import service
    from kronos_stream.daemon.config.environment import read_settings
    from kronos_stream.daemon.telemetry.logs import configure

    settings = read_settings(os.environ)
    if check:
        configure("console", "error")
        asyncio.run(_check(settings))
    else:
        configure(settings.log.format, settings.log.level)
        asyncio.run(service.serve(service.build_role(settings)))


async def _check(settings: Settings) -> None:
    """Print what doctor finds about venues and model. Raises SettingsError if a check fails."""
    from kronos_stream.commands.doctor import finding_text, print_finding
    from kronos_stream.daemon.config.settings import SettingsError
    from kronos_stream.daemon.doctor.doctor import Doctor

    skip = {"state", "http", "sinks"}
    if settings.role == "forecast":
        skip.add("venues")  # its candles come from Kafka
    results = [result async for result in Doctor(settings).examine(lambda _: None, skip)]
    if failed := [finding_text(*result) for result in results if result.finding.level == "fail"]:
        raise SettingsError(failed)
    for name, finding in results:
        print_finding(name, finding)
