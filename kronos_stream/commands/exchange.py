"""``kronos-stream exchange``: the simulated exchange alone, for bots and daemons to try on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kronos_stream.market.timeframe import Timeframe

if TYPE_CHECKING:
    from kronos_stream.testing.exchange import Faults, SimulatedExchange


def _parse_timeframes(_: click.Context, __: click.Parameter, text: str) -> list[str]:
    try:
        return [str(Timeframe.parse(part.strip())) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command(context_settings={"show_default": True})
@click.option(
    "--symbols",
    type=click.IntRange(min=0),
    default=20,
    metavar="N",
    help="How many spot markets to make up: SIM00USDT, SIM01USDT and on.",
)
@click.option(
    "--perpetuals",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="How many USD-M perpetuals of the same names, with candles of their own.",
)
@click.option(
    "--timeframe",
    "timeframes",
    default="",
    callback=_parse_timeframes,
    metavar="LIST",
    help="Intervals to offer, with commas; the shortest is drawn, the others are made of it. "
    "Left out: 1s, or that of the candles.",
)
@click.option(
    "--candles",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Replay candles as if they happened now, over and over; the first half at most is "
    "history. One file per market, named after it: BTCUSDT-5m.csv. May be given several times.",
)
@click.option("--seed", type=int, default=0, metavar="N", help="Of the market and of the faults.")
@click.option(
    "--speed",
    type=click.FloatRange(min=0.01, max=10_000),
    default=1.0,
    metavar="X",
    help="How many times as fast as the wall clock the exchange's clock goes.",
)
@click.option(
    "--history",
    type=click.IntRange(min=1),
    default=600,
    metavar="BARS",
    help="Bars of the longest interval that there are at the start.",
)
@click.option(
    "--faults",
    default="none",
    metavar="PRESET|JSON",
    help="What goes wrong: none, connections, rollover, quiet, dirty, gaps, rest, skewed, rough, "
    'random, or JSON such as {"drop": 60, "missing_final": 0.1}.',
)
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(min=0, max=65_535),
    default=0,
    metavar="N",
    help="Port to listen on; 0 takes any that is free.",
)
@click.option("--json", "as_json", is_flag=True, help="Say where it listens in one line of JSON.")
@click.option(
    "--with-parent",
    is_flag=True,
    help="End when standard input ends: with a pipe there, when the process at its other end does.",
)
def exchange(
    symbols: int,
    perpetuals: int,
    timeframes: list[str],
    candles: tuple[Path, ...],
    seed: int,
    speed: float,
    history: int,
    faults: str,
    host: str,
    port: int,
    *,
    as_json: bool,
    with_parent: bool,
) -> None:
    """Run an exchange that speaks Binance's protocol, spot and USD-M futures.

    Its markets are made up from a seed, or replayed from files; its faults are on request. Point
    any client of Binance's public market data at the URLs it prints: both REST and websockets,
    spot and futures, are on one port (futures' websockets under /market). It needs no network
    and ends with Ctrl-C.
    """
    from kronos_stream.market.clock import LoopClock, SystemClock
    from kronos_stream.testing.exchange import (
        ExchangeError,
        Faults,
        FaultsError,
        SimulatedExchange,
    )

    if not candles and symbols + perpetuals == 0:
        raise click.UsageError("an exchange needs a market: --symbols, --perpetuals or --candles")
    try:
        chosen = Faults.parse(faults, seed)
    except FaultsError as error:
        raise click.BadParameter(str(error), param_hint="--faults") from None

    async def serve() -> None:
        now = SystemClock().now()
        clock = SystemClock() if speed == 1.0 else LoopClock(now, speed)
        try:
            served = SimulatedExchange(
                symbols,
                perpetuals=perpetuals,
                timeframes=timeframes,
                candles=candles,
                seed=seed,
                faults=chosen,
                history=history,
                clock=clock,
                host=host,
                port=port,
            )
        except ExchangeError as error:
            raise click.UsageError(str(error)) from None
        stop = _stop_signals(with_parent=with_parent)
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(served)
            except OSError as error:
                raise click.ClickException(f"cannot listen: {error.strerror or error}") from None
            _announce(served, chosen, as_json=as_json)
            await served.run(stop)

    asyncio.run(serve())


def _stop_signals(*, with_parent: bool) -> asyncio.Event:
    """Set by Ctrl-C and SIGTERM; ``with_parent`` also by the end of standard input."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    with suppress(NotImplementedError):  # not on Windows, where both raise as ever
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
    if with_parent:
        stdin = sys.stdin.fileno()

        def read() -> None:
            if not os.read(stdin, 4096):
                loop.remove_reader(stdin)
                stop.set()

        loop.add_reader(stdin, read)
    return stop


def _announce(served: SimulatedExchange, faults: Faults, *, as_json: bool) -> None:
    """One line, once clients may come."""
    listed = served.symbols
    if as_json:
        facts = {
            "rest": served.rest_url,
            "ws": served.ws_url,
            "symbols": listed,
            "timeframes": served.timeframes,
            "faults": json.loads(faults.dumps()),
        }
        click.echo(json.dumps(facts))
    else:
        click.echo(
            f"{len(listed)} markets from {listed[0]} on, {', '.join(served.timeframes)}: "
            f"REST {served.rest_url}, websockets {served.ws_url}"
        )
