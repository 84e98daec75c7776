"""Implementation of ``kronos-stream exchange``: the simulated exchange as a process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import AsyncExitStack, suppress
from typing import Any

import click

from kronos_stream.market.clock import LoopClock, SystemClock
from kronos_stream.testing.exchange import ExchangeError, Faults, FaultsError, SimulatedExchange


def run(
    *,
    seed: int,
    speed: float,
    faults: str,
    as_json: bool,
    with_parent: bool,
    **markets: Any,  # noqa: ANN401 - passed on
) -> None:
    """Run until a signal or, ``with_parent``, the end of standard input.

    markets: further arguments of SimulatedExchange.
    """
    if not markets["candles"] and markets["symbols"] + markets["perpetuals"] == 0:
        raise click.UsageError("an exchange needs a market: --symbols, --perpetuals or --candles")
    try:
        parsed_faults = Faults.parse(faults, seed)
    except FaultsError as error:
        raise click.BadParameter(str(error), param_hint="--faults") from None

    async def serve() -> None:
        clock = SystemClock() if speed == 1.0 else LoopClock(SystemClock().now(), speed)
        try:
            exchange = SimulatedExchange(seed=seed, faults=parsed_faults, clock=clock, **markets)
        except ExchangeError as error:
            raise click.UsageError(str(error)) from None
        stop = _stop_event(with_parent=with_parent)
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(exchange)
            except OSError as error:
                raise click.ClickException(f"cannot listen: {error.strerror or error}") from None
            _announce(exchange, parsed_faults, as_json=as_json)
            await exchange.run(stop)

    asyncio.run(serve())


def _stop_event(*, with_parent: bool) -> asyncio.Event:
    """An event set by SIGINT and SIGTERM; ``with_parent`` also by the end of standard input."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    with suppress(NotImplementedError):  # on Windows, where both raise as usual
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


def _announce(exchange: SimulatedExchange, faults: Faults, *, as_json: bool) -> None:
    """Print one line as soon as clients may connect."""
    symbols = exchange.symbols
    if as_json:
        facts = {
            "rest": exchange.rest_url,
            "ws": exchange.ws_url,
            "symbols": symbols,
            "timeframes": exchange.timeframes,
            "faults": json.loads(faults.dumps()),
        }
        click.echo(json.dumps(facts))
    else:
        click.echo(
            f"{len(symbols)} markets from {symbols[0]} on, {', '.join(exchange.timeframes)}: "
            f"REST {exchange.rest_url}, websockets {exchange.ws_url}"
        )
