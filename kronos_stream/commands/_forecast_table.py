"""Forecasts as rows of a table and as lines, for ``kronos-stream tail``."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from kronos_stream.commands._text import printable
from kronos_stream.forecast.message import Forecast

_MAX_SERIES = 10_000
"""Series kept; beyond that, the one without a new forecast for the longest time is removed."""

_OVERHEAD_LINES = 6
"""Lines of the table besides its rows."""

_PADDING = 3
"""Characters per column besides its text."""
_OPTIONAL_COLUMNS = (7, 8, 1, 9, 4, 2)
"""Columns omitted if the terminal is too narrow, in this order: volatility, age, origin …"""


class ForecastTable:
    """The newest forecast of each series. Times are UTC ms."""

    def __init__(self, title: str, *, newest_first: bool) -> None:
        self._title, self._newest_first = title, newest_first
        self._rows: dict[str, Forecast] = {}
        self._received = 0

    def add(self, forecast: Forecast) -> None:
        """Keep the newest forecast of a series, by origin and revision."""
        self._received += 1
        old = self._rows.pop(forecast.series, None)
        if old is not None and (old.origin, old.revision) > (forecast.origin, forecast.revision):
            forecast = old
        self._rows[forecast.series] = forecast
        if len(self._rows) > _MAX_SERIES:
            del self._rows[next(iter(self._rows))]

    def render(self, now: int, width: int, height: int) -> Table:
        """A table that fits ``width`` and ``height``; expired forecasts are dim.

        Rows beyond the height are counted, and columns beyond the width are omitted.
        """
        shown = self._sorted()[: max(1, height - _OVERHEAD_LINES)]
        names = {band_names(forecast) for forecast in shown}
        title = f"{self._title}: {self._received:,} forecasts of {len(self._rows):,} series"
        table = Table(title=title, title_justify="left", title_style="")
        low, middle, high = names.pop() if len(names) == 1 else ("low", "middle", "high")
        titles = ("series", "origin", "last", low, middle, high, "P(up)", "volatility", "age", "")
        rows = [_cells(forecast, now) for forecast in shown]
        columns = _visible_columns(titles, rows, width)
        for at in columns:
            table.add_column(titles[at], justify="right" if at else "left", no_wrap=True)
        for forecast, cells in zip(shown, rows, strict=True):
            expired = forecast.valid_until.timestamp() * 1000 <= now
            table.add_row(*(cells[at] for at in columns), style="dim" if expired else None)
        if len(shown) < len(self._rows):
            table.caption = f"and {len(self._rows) - len(shown):,} more"
        return table

    def _sorted(self) -> Sequence[Forecast]:
        if self._newest_first:
            return sorted(
                self._rows.values(), key=lambda forecast: forecast.created_at, reverse=True
            )
        return [self._rows[name] for name in sorted(self._rows)]


def _visible_columns(
    titles: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> Sequence[int]:
    """Indices of the columns to show: those that are not empty and fit ``width``."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    columns = [at for at, needed in enumerate(widths) if needed]
    for optional in _OPTIONAL_COLUMNS:
        if sum(widths[at] + _PADDING for at in columns) + 1 <= width:
            break
        if optional in columns:
            columns.remove(optional)
    return columns


def band_names(forecast: Forecast) -> tuple[str, str, str]:
    """Names of the bands to show: q05, q50, q95; without them, the outermost and the mean."""
    names = sorted(name for name in forecast.close if name != "mean")
    low = "q05" if "q05" in names else names[0]
    high = "q95" if "q95" in names else names[-1]
    return low, "q50" if "q50" in names else "mean", high


def format_line(forecast: Forecast) -> str:
    """One line with the final close: median, outer bands and the probability of a rise."""
    names = band_names(forecast)
    low, middle, high = (f"{forecast.close[name][-1]:.6g}" for name in names)
    return (
        f"{forecast.origin:%Y-%m-%d %H:%M:%S}  {printable(forecast.series)}  "
        f"last {forecast.last.close:.6g}  "
        f"in {len(forecast.times)} bars {middle} ({names[0]} {low}, {names[2]} {high})"
        f"  P(up) {forecast.summary.p_up:.2f}" + ("  degraded" if forecast.degraded else "")
    )


def _cells(forecast: Forecast, now: int) -> tuple[str, ...]:
    volatility = forecast.summary.volatility
    return (
        printable(forecast.series),
        f"{forecast.origin:%m-%d %H:%M:%S}",
        f"{forecast.last.close:.6g}",
        *(f"{forecast.close[name][-1]:.6g}" for name in band_names(forecast)),
        f"{forecast.summary.p_up:.2f}",
        "" if volatility is None else f"{volatility:.3%}",
        _format_age(now - forecast.created_at.timestamp() * 1000),
        "degraded" if forecast.degraded else "",
    )


def _format_age(milliseconds: float) -> str:
    """An age in the largest unit of which it has at least two."""
    seconds = max(0, int(milliseconds / 1000))
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
