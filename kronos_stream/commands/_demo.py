"""The demo: the whole daemon on a simulated exchange and an embedded broker, and what it shows."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live

from kronos_stream.commands._demo_stats import DemoStats, TimedSink
from kronos_stream.daemon import service
from kronos_stream.daemon.config.settings import HttpSettings, Settings
from kronos_stream.daemon.roles.standalone import StandaloneRole
from kronos_stream.daemon.telemetry.logs import configure
from kronos_stream.interfaces import plugins
from kronos_stream.market.clock import SystemClock
from kronos_stream.market.watchlist import WatchlistEntry
from kronos_stream.testing.broker import EmbeddedBroker

_LOOKBACK, _HORIZON, _PATHS = 96, 8, 20
_HISTORY = 200
_START_SECONDS, _END_SECONDS = 60.0, 5.0
_FRAMES_PER_SECOND = 4
_READER_SECONDS = 2.0
"""Readers get so long after the last forecast: the broker forgets everything at its end."""

_TOPICS = ("kronos.forecasts.v1", "kronos.forecasts.latest.v1", "kronos.deadletter.v1")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command was told."""

    seconds: float | None
    symbols: int
    timeframe: str
    candles: tuple[Path, ...]
    seed: int
    faults: str
    as_json: bool


def run(options: Options) -> None:
    """Run the demo to its end and print the figures."""
    configure("console", "warning")
    asyncio.run(_run(options))


async def _run(options: Options) -> None:
    console = Console(stderr=options.as_json, highlight=False)
    console.print("Starting a simulated exchange, an embedded Kafka broker and the daemon …")
    with tempfile.TemporaryDirectory(prefix="kronos-demo-") as folder:
        async with _exchange(options) as served:
            with EmbeddedBroker(_TOPICS) as broker:
                settings = _settings(served, broker.bootstrap, Path(folder))
                figures = await _forecast(options, settings, broker.bootstrap, console)
                await asyncio.sleep(_READER_SECONDS)
    if options.as_json:
        click.echo(json.dumps(figures.to_dict()))
    else:
        console.print(figures.report())


async def _forecast(
    options: Options, settings: Settings, bootstrap: str, console: Console
) -> DemoStats:
    clock = SystemClock()
    figures = DemoStats([series.name for series in settings.series()], clock)
    sinks = [TimedSink(sink, figures) for sink in service.build_sinks(settings, clock)]
    daemon = service.build_standalone(settings, sinks=sinks, on_results=figures.record_results)
    console.print(f"Kafka listens at [bold]{bootstrap}[/bold]. Read the forecasts elsewhere with:")
    console.print(f"  kcat -C -q -b {bootstrap} -t kronos.forecasts.v1", soft_wrap=True)
    console.print(f"  {_tail_command(bootstrap)}", soft_wrap=True)
    showing = asyncio.create_task(_show(figures, console))
    ending = asyncio.create_task(_stop_after(figures, daemon, options.seconds))
    try:
        await service.serve(daemon)
    finally:
        for task in (showing, ending):
            task.cancel()
        await asyncio.wait((showing, ending))
    return figures


def _tail_command(bootstrap: str) -> str:
    """A command that reads with the client in this package."""
    return f"{sys.executable} -m kronos_stream tail {bootstrap}"


async def _show(figures: DemoStats, console: Console) -> None:
    """A live table on a terminal; elsewhere a line now and then."""
    if not console.is_terminal:
        while True:
            await asyncio.sleep(_END_SECONDS)
            console.print(figures.summary_line())
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            live.update(figures.table(), refresh=True)
            await asyncio.sleep(1 / _FRAMES_PER_SECOND)


async def _stop_after(figures: DemoStats, daemon: StandaloneRole, seconds: float | None) -> None:
    """Stop ``seconds`` after the first forecast."""
    if seconds is not None:
        await figures.first_delivered.wait()
        await asyncio.sleep(seconds)
        daemon.stop()


@asynccontextmanager
async def _exchange(options: Options) -> AsyncIterator[dict[str, Any]]:
    """The simulated exchange in a process of its own: what it says of itself."""
    command = [sys.executable, "-P", "-m", "kronos_stream", "exchange", "--json", "--with-parent"]
    command += ["--seed", str(options.seed), "--faults", options.faults]
    command += ["--history", str(_HISTORY), "--timeframe", options.timeframe]
    if options.candles:
        command += [part for path in options.candles for part in ("--candles", str(path))]
    else:
        command += ["--symbols", str(options.symbols)]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None  # noqa: S101 - both are pipes
    assert process.stdout is not None  # noqa: S101
    try:
        async with asyncio.timeout(_START_SECONDS):
            line = await process.stdout.readline()
        if not line:  # it has said why on stderr
            raise click.exceptions.Exit(await process.wait() or 1)
        yield json.loads(line)
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(_END_SECONDS):
                await process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _settings(served: dict[str, Any], bootstrap: str, folder: Path) -> Settings:
    binance, kafka = plugins.options_type("binance"), plugins.options_type("kafka")
    assert binance is not None  # noqa: S101 - both are in this distribution
    assert kafka is not None  # noqa: S101
    return Settings(
        symbols=tuple(WatchlistEntry("binance", symbol) for symbol in served["symbols"]),
        timeframes=tuple(served["timeframes"]),
        sinks=("kafka",),
        model="nano",
        lookback=_LOOKBACK,
        horizon=_HORIZON,
        paths=_PATHS,
        state_file=folder / "state.sqlite",
        http=HttpSettings(port=0),
        options={
            "binance": binance(
                ws_url=served["ws"],
                rest_url=served["rest"],
                futures_ws_url=f"{served['ws']}/market",
                futures_rest_url=served["rest"],
            ),
            "kafka": kafka(bootstrap_servers=bootstrap),
        },
    )
