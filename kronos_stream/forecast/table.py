"""A forecast as a text table of 80 columns, on a terminal or in a pipe."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import IO

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kronos_stream.forecast.fan import Fan
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.utc import rfc3339

_DAY_MS = 86_400_000
_MINUTE_MS = 60_000
_SIGNIFICANT = 6
_MAX_WIDTH = 10_000


def print_fan(fan: Fan, subtitle: str, file: IO[str] | None = None) -> None:
    """Print a heading with ``subtitle``, the quantiles of the close per step, and the summary."""
    decimals = price_decimals(fan.last)
    title = Text(fan.series, style="bold")
    title.append(f"  origin {rfc3339(fan.origin)}  last {fan.last:.{decimals}f}", style="not bold")
    table = _table(fan, decimals)
    console = Console(file=file)
    needed = Measurement.get(console, console.options.update(max_width=_MAX_WIDTH), table).maximum
    console.width = max(console.width, needed)  # rather long lines than truncated numbers
    console.print(title, Text(subtitle, style="dim"), table, summary_text(fan), sep="\n")


def price_decimals(price: float) -> int:
    """Decimals with which a price of this size has six significant digits."""
    if price == 0:
        return 2
    return min(max(_SIGNIFICANT - 1 - math.floor(math.log10(abs(price))), 0), 12)


def time_format(timeframe: Timeframe) -> str:
    """The shortest strftime format that distinguishes bars of ``timeframe``."""
    step = timeframe.milliseconds
    if step is None or step % _DAY_MS == 0:
        return "%Y-%m-%d"
    return "%m-%d %H:%M" if step % _MINUTE_MS == 0 else "%m-%d %H:%M:%S"


def summary_text(fan: Fan) -> Text:
    """The summary as text, with returns in percent."""
    summary = fan.summary()
    bars = "1 bar" if len(fan.times) == 1 else f"{len(fan.times)} bars"
    returns = [_percent(value) for value in summary.return_quantiles.values()]
    return Text(
        f"After {bars}: P(up) {100 * summary.p_up:.0f} %, "
        f"expected return {_percent(summary.expected_return)}, "
        f"from {returns[0]} ({100 * fan.probs[0]:g} %) to {returns[-1]} "
        f"({100 * fan.probs[-1]:g} %)\n"
        f"Volatility per bar {_percent(summary.volatility, sign='')}, "
        f"value at risk 95 % {_percent(summary.value_at_risk_95, sign='')}"
    )


def _percent(value: float | None, sign: str = "+") -> str:
    return "n/a" if value is None else f"{100 * value:{sign}.2f} %"


def _table(fan: Fan, decimals: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 2), pad_edge=False)
    table.add_column("time (UTC)", no_wrap=True)
    for p in fan.probs:
        table.add_column(f"{100 * p:g} %", justify="right", no_wrap=True)
    form = time_format(fan.timeframe)
    for time, row in zip(fan.times.tolist(), fan.quantiles().T.tolist(), strict=True):
        cells = [Text(f"{price:.{decimals}f}", style=_style(price, fan.last)) for price in row]
        table.add_row(datetime.fromtimestamp(time / 1000, UTC).strftime(form), *cells)
    return table


def _style(price: float, last: float) -> str:
    return "green" if price > last else "red" if price < last else ""
