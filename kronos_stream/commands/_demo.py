"""Implementation of ``kronos-stream demo``: simulated exchange, daemon and embedded broker."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
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
"""Time for readers to fetch the last forecasts before the broker stops and its records are lost."""

_TOPICS = ("kronos.forecasts.v1", "kronos.forecasts.latest.v1", "kronos.deadletter.v1")


def run(
    *,
    seconds: float | None,
    symbols: int,
    timeframe: str,
    candles: tuple[Path, ...],
    seed: int,
    faults: str,
    as_json: bool,
) -> None:
    """Run the demo to its end and print the figures."""
    configure("console", "warning")
    markets = [part for path in candles for part in ("--candles", str(path))]
    markets = markets or ["--symbols", str(symbols)]
    exchange = ["--seed", str(seed), "--faults", faults, "--timeframe", timeframe, *markets]
    console = Console(stderr=as_json, highlight=False)
    stats = asyncio.run(_run(exchange, seconds, console))
    if as_json:
        click.echo(json.dumps(stats.to_dict()))
    else:
        console.print(stats.report())


async def _run(exchange: Sequence[str], seconds: float | None, console: Console) -> DemoStats:
    console.print("Starting a simulated exchange, an embedded Kafka broker and the daemon …")
    with tempfile.TemporaryDirectory(prefix="kronos-demo-") as folder:
        async with _run_exchange(exchange) as facts:
            with EmbeddedBroker(_TOPICS) as broker:
                settings = _settings(facts, broker.bootstrap, Path(folder))
                stats = await _forecast(settings, seconds, broker.bootstrap, console)
                await asyncio.sleep(_READER_SECONDS)
    return stats


async def _forecast(
    settings: Settings, seconds: float | None, bootstrap: str, console: Console
) -> DemoStats:
    clock = SystemClock()
    stats = DemoStats([series.name for series in settings.series()], clock)
    sinks = [TimedSink(sink, stats) for sink in service.build_sinks(settings, clock)]
    daemon = service.build_standalone(settings, sinks=sinks, on_results=stats.record_results)
    console.print(
        f"Kafka listens at [bold]{bootstrap}[/bold]. To read the forecasts in another terminal:"
    )
    console.print(f"  kcat -C -q -b {bootstrap} -t kronos.forecasts.v1", soft_wrap=True)
    console.print(f"  {sys.executable} -m kronos_stream tail {bootstrap}", soft_wrap=True)
    tasks = (
        asyncio.create_task(_show(stats, console)),
        asyncio.create_task(_stop_after(stats, daemon, seconds)),
    )
    try:
        await service.serve(daemon)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    return stats


async def _show(stats: DemoStats, console: Console) -> None:
    """Show a live table on a terminal; elsewhere print a line every few seconds."""
    if not console.is_terminal:
        while True:
            await asyncio.sleep(_END_SECONDS)
            console.print(stats.summary_line())
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            live.update(stats.table(), refresh=True)
            await asyncio.sleep(1 / _FRAMES_PER_SECOND)


async def _stop_after(stats: DemoStats, daemon: StandaloneRole, seconds: float | None) -> None:
    """Stop the daemon ``seconds`` after the first forecast; None: never."""
    if seconds is not None:
        await stats.first_delivered.wait()
        await asyncio.sleep(seconds)
        daemon.stop()


@asynccontextmanager
async def _run_exchange(arguments: Sequence[str]) -> AsyncIterator[dict[str, Any]]:
    """Run the simulated exchange in its own process; gives the JSON that it prints."""
    command = [sys.executable, "-P", "-m", "kronos_stream", "exchange", "--json", "--with-parent"]
    command += ["--history", str(_HISTORY), *arguments]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None  # noqa: S101 - both are pipes
    assert process.stdout is not None  # noqa: S101
    try:
        async with asyncio.timeout(_START_SECONDS):
            line = await process.stdout.readline()
        if not line:  # it has printed the reason on stderr
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


def _settings(exchange: dict[str, Any], bootstrap: str, folder: Path) -> Settings:
    binance, kafka = plugins.options_type("binance"), plugins.options_type("kafka")
    assert binance is not None  # noqa: S101 - both are in this distribution
    assert kafka is not None  # noqa: S101
    return Settings(
        symbols=tuple(WatchlistEntry("binance", symbol) for symbol in exchange["symbols"]),
        timeframes=tuple(exchange["timeframes"]),
        sinks=("kafka",),
        model="nano",
        lookback=_LOOKBACK,
        horizon=_HORIZON,
        paths=_PATHS,
        state_file=folder / "state.sqlite",
        http=HttpSettings(port=0),
        options={
            "binance": binance(
                ws_url=exchange["ws"],
                rest_url=exchange["rest"],
                futures_ws_url=f"{exchange['ws']}/market",
                futures_rest_url=exchange["rest"],
            ),
            "kafka": kafka(bootstrap_servers=bootstrap),
        },
    )
