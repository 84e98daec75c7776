"""Example bot: python bot.py localhost:9092 BTC/USDT ETH/USDT."""

import asyncio
import sys
from contextlib import suppress

from kronos_stream.client import forecasts


async def main(bootstrap: str, *symbols: str) -> None:
    """Print an action for each forecast; expired and degraded forecasts are skipped."""
    async for forecast in forecasts(bootstrap, symbols=symbols or None):
        if not forecast.degraded:
            p_up = forecast.summary.p_up
            action = "buy" if p_up > 0.6 else "sell" if p_up < 0.4 else "hold"
            print(forecast.series, f"{forecast.origin:%FT%TZ}", f"{p_up:.2f}", action, flush=True)


with suppress(KeyboardInterrupt):
    asyncio.run(main(*sys.argv[1:]))
