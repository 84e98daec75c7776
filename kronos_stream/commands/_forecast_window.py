"""The bars of a file that a forecast sees, and the bars that it predicts."""

from __future__ import annotations

from dataclasses import dataclass

import click
import numpy as np
from numpy.typing import NDArray

from kronos_stream.market.candle_files import CandleTable
from kronos_stream.market.spacing import find_gaps
from kronos_stream.market.utc import rfc3339

_MIN_BARS = 2


@dataclass(frozen=True, slots=True, eq=False)
class InputWindow:
    """Past bars ``times`` (L,) and ``values`` (L, 6); ``future`` (horizon,) opens; UTC ms.

    ``missing`` counts the bars that the file lacks between the first and the last.
    """

    times: NDArray[np.int64]
    values: NDArray[np.float64]
    future: NDArray[np.int64]
    missing: int

    @property
    def origin(self) -> int:
        return int(self.times[-1])


def bars_to_origin(table: CandleTable, at: int | None) -> int:
    """Count the bars up to and including the origin, which opens ``at`` (UTC ms; None: the last).

    Raises click.UsageError if no bar opens then.
    """
    if at is None:
        return len(table)
    end = int(np.searchsorted(table.times, at, side="right"))
    origin = rfc3339(at)
    if end == 0:
        first = rfc3339(int(table.times[0]))
        raise click.UsageError(f"--at {origin}: before the file's first bar, {first}")
    found = int(table.times[end - 1])
    if found != at:
        raise click.UsageError(
            f"--at {origin}: no bar opens then; the one before opens {rfc3339(found)}"
        )
    return end


def cut_window(
    table: CandleTable, end: int, lookback: int, horizon: int, max_context: int
) -> InputWindow:
    """The last ``lookback`` bars before ``end``, or as many as the file and the model allow.

    Prints a note if they are fewer, or if bars are missing. Raises click.UsageError if less than
    two are left.
    """
    room = max_context - horizon
    if room < _MIN_BARS:
        raise click.UsageError(
            f"--horizon {horizon} leaves no room for past bars in the model's window of "
            f"{max_context} bars"
        )
    bars = min(lookback, end, room)
    if bars < _MIN_BARS:
        raise click.UsageError(
            f"{table.path}: only one bar up to the origin; a forecast needs at least {_MIN_BARS}"
        )
    if bars < lookback:
        reason = (
            "the file has no more up to the origin"
            if bars == end
            else f"the model's window is {max_context} bars, including a horizon of {horizon}"
        )
        _print_note(f"lookback {lookback} clipped to {bars} bars: {reason}")
    times = table.times[end - bars : end]
    gaps = find_gaps(times, table.timeframe)
    missing = sum(count for _, count in gaps)
    if gaps:
        first = rfc3339(gaps[0][0])
        _print_note(f"the lookback spans {missing} missing bars, the first after {first}")
    after, origin = table.timeframe.after, int(times[-1])
    try:
        future = np.array([after(origin, step) for step in range(1, horizon + 1)])
        rfc3339(int(future[-1]))
    except (OverflowError, ValueError):  # beyond the last year of the calendar
        raise click.UsageError(
            f"{horizon} bars of {table.timeframe} after {rfc3339(origin)} pass the year 9999; "
            "is --timeframe right?"
        ) from None
    return InputWindow(times, table.values[end - bars : end], future, missing)


def _print_note(text: str) -> None:
    click.echo(f"note: {text}", err=True)
