"""Which of a file's bars a forecast sees, and which it is about."""

from __future__ import annotations

from dataclasses import dataclass

import click
import numpy as np
from numpy.typing import NDArray

from kronos_stream.commands._forecast_arguments import ForecastArguments
from kronos_stream.market.candle_files import CandleTable
from kronos_stream.market.spacing import find_gaps
from kronos_stream.market.utc import rfc3339

_MIN_BARS = 2


@dataclass(frozen=True, slots=True, eq=False)
class InputWindow:
    """Past bars ``times`` (L,) and ``values`` (L, 6); ``future`` (horizon,) opens; UTC ms.

    ``missing`` counts the bars that the venue or the file lacks between the first and the last.
    """

    times: NDArray[np.int64]
    values: NDArray[np.float64]
    future: NDArray[np.int64]
    missing: int

    @property
    def origin(self) -> int:
        return int(self.times[-1])


def bars_to_origin(request: ForecastArguments, table: CandleTable) -> int:
    """How many of the table's bars there are up to the origin, it included."""
    if request.at is None:
        return len(table)
    end = int(np.searchsorted(table.times, request.at, side="right"))
    asked = rfc3339(request.at)
    if end == 0:
        first = rfc3339(int(table.times[0]))
        raise click.UsageError(f"--at {asked}: before the file's first bar, {first}")
    found = int(table.times[end - 1])
    if found != request.at:
        raise click.UsageError(
            f"--at {asked}: no bar opens then; the one before opens {rfc3339(found)}"
        )
    return end


def cut_window(
    request: ForecastArguments, table: CandleTable, end: int, max_context: int
) -> InputWindow:
    """The last bars before ``end`` that fit the request and the model; says so if they are few."""
    room = max_context - request.horizon
    if room < _MIN_BARS:
        raise click.UsageError(
            f"--horizon {request.horizon} leaves no room for past bars in the model's window of "
            f"{max_context} bars"
        )
    bars = min(request.lookback, end, room)
    if bars < _MIN_BARS:
        raise click.UsageError(
            f"{request.file}: only one bar up to the origin; a forecast needs at least {_MIN_BARS}"
        )
    if bars < request.lookback:
        why = (
            "the file has no more up to the origin"
            if bars == end
            else f"the model's window of {max_context} bars less a horizon of {request.horizon}"
        )
        _print_note(f"lookback {request.lookback} clipped to {bars} bars: {why}")
    times = table.times[end - bars : end]
    gaps = find_gaps(times, table.timeframe)
    missing = sum(count for _, count in gaps)
    if gaps:
        first = rfc3339(gaps[0][0])
        _print_note(f"the lookback spans {missing} missing bars, the first after {first}")
    after, origin = table.timeframe.after, int(times[-1])
    try:
        future = np.array([after(origin, step) for step in range(1, request.horizon + 1)])
        rfc3339(int(future[-1]))
    except (OverflowError, ValueError):  # a calendar's, past its last year
        raise click.UsageError(
            f"{request.horizon} bars of {table.timeframe} after {rfc3339(origin)} pass the year "
            "9999; is --timeframe right?"
        ) from None
    return InputWindow(times, table.values[end - bars : end], future, missing)


def _print_note(text: str) -> None:
    click.echo(f"note: {text}", err=True)
