"""A forecast as a picture: the last candles, the fan of quantile bands, a few sample paths."""

from __future__ import annotations

import warnings
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter
from numpy.typing import NDArray

from kronos_stream.atomic import atomic_write
from kronos_stream.forecast.fan import Fan
from kronos_stream.market.candle_files import CandleTable

_BARS = 100
_SAMPLES = 6
_RISE, _FALL = "#2a9d8f", "#d1495b"
_FAN, _INK, _FAINT, _GRID = "#3867b7", "#22303c", "#6b7a89", "#e6eaee"
_BODY = 0.7

_MINUTE, _HOUR, _DAY = 60_000, 3_600_000, 86_400_000
_TICK_STEPS = (
    *(n * 1_000 for n in (1, 2, 5, 10, 15, 30)),
    *(n * _MINUTE for n in (1, 2, 5, 10, 15, 30)),
    *(n * _HOUR for n in (1, 2, 3, 6, 12)),
    *(n * _DAY for n in (1, 2, 4, 7, 14, 28, 56, 91, 182, 365, 730, 1826, 3652)),
)
_MAX_TICKS = 9


def draw_fan(path: Path, table: CandleTable, fan: Fan, subtitle: str) -> None:
    """Draw the bars of ``table`` up to the fan's origin, and the fan; write ``path`` atomically.

    Bars are equally spaced, so that nights and weekends without trading take no space. The suffix
    of ``path`` gives the format: png, svg or pdf.
    """
    end = int(np.searchsorted(table.times, fan.origin)) + 1
    start = max(0, end - _BARS)
    times, candles = table.times[start:end], table.values[start:end]
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
    figure = Figure(figsize=(12, 6.75), dpi=150, facecolor="white", layout=layout)
    if table.has_volume:
        price, volume = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
        _volume(volume, candles)
        bottom = volume
        price.tick_params(labelbottom=False)
    else:
        price = bottom = figure.subplots()
    for axes in figure.axes:
        _style_axes(axes)
    _candles(price, candles)
    _bands(price, fan)
    _price_axis(price, candles, fan)
    _time_axis(bottom, np.concatenate([times, fan.times]), len(times))
    price.axvline(0, color=_FAINT, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
    _titles(price, fan, subtitle)
    with atomic_write(path) as part, warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes; a warning does not help.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(part, format=path.suffix[1:].lower())


def _positions(count: int) -> NDArray[np.int64]:
    """Positions of the last ``count`` bars on the x axis: the origin is at 0."""
    return np.arange(count) - (count - 1)


def _candles(axes: Axes, candles: NDArray[np.float64]) -> None:
    x = _positions(len(candles))
    opened, high, low, close = candles[:, :4].T
    colours = np.where(close >= opened, _RISE, _FALL).tolist()
    wicks = [((i, a), (i, b)) for i, a, b in zip(x, low, high, strict=True)]
    axes.add_collection(LineCollection(wicks, colors=colours, linewidths=0.9, zorder=2))
    half = _BODY / 2
    bodies = [
        ((i - half, a), (i - half, b), (i + half, b), (i + half, a))
        for i, a, b in zip(x, opened, close, strict=True)
    ]
    # The edge keeps a bar with open = close visible, as a dash.
    axes.add_collection(
        PolyCollection(bodies, facecolors=colours, edgecolors=colours, linewidths=0.7, zorder=3)
    )


def _volume(axes: Axes, candles: NDArray[np.float64]) -> None:
    colours = np.where(candles[:, 3] >= candles[:, 0], _RISE, _FALL).tolist()
    axes.bar(_positions(len(candles)), candles[:, 4], _BODY, color=colours, alpha=0.55, linewidth=0)
    axes.set_ylabel("volume", color=_FAINT, fontsize=9)
    axes.yaxis.set_major_locator(FixedLocator([0, float(candles[:, 4].max())]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _compact_number(v)))


def _bands(axes: Axes, fan: Fan) -> None:
    x = np.arange(len(fan.times) + 1)

    def from_last(prices: NDArray[np.floating]) -> NDArray[np.float64]:
        return np.concatenate([[fan.last], prices])

    quantiles = fan.quantiles()
    pairs = len(fan.probs) // 2
    for i in range(pairs):
        low, high = fan.probs[i], fan.probs[-1 - i]
        axes.fill_between(
            x,
            from_last(quantiles[i]),
            from_last(quantiles[-1 - i]),
            color=_tint(0.16 + 0.24 * i / pairs),
            linewidth=0,
            zorder=1.5,
            label=f"{100 * low:g} to {100 * high:g} %",
        )
    for i, closes in enumerate(fan.closes[:_SAMPLES]):
        label = "sample paths" if i == 0 else None
        axes.plot(
            x, from_last(closes), color=_FAN, alpha=0.45, linewidth=0.7, zorder=2.5, label=label
        )
    median = from_last(fan.quantiles((0.5,))[0])
    axes.plot(x, median, color=_FAN, linewidth=2.2, zorder=4, label="median")
    if len(x) == 2:  # a single step is clearer as a point than as a line
        axes.plot(x[1:], median[1:], "o", color=_FAN, markersize=4, zorder=4)


def _price_axis(axes: Axes, candles: NDArray[np.float64], fan: Fan) -> None:
    shown = np.concatenate([candles[:, 1:3].ravel(), fan.quantiles().ravel()])
    low, high = float(shown.min()), float(shown.max())
    margin = 0.06 * (high - low) or abs(high) * 0.01 or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    axes.axhline(fan.last, color=_FAINT, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
    legend = axes.legend(
        loc="upper left", fontsize=9, framealpha=0.85, edgecolor="none", labelcolor=_INK,
        title="close", title_fontsize=9, alignment="left",
    )  # fmt: skip
    legend.get_title().set_color(_FAINT)


def _tint(share: float) -> tuple[float, ...]:
    """The fan's colour mixed with white; opaque, so that legend and plot look the same."""
    return tuple(1 - share * (1 - part) for part in to_rgb(_FAN))


def _time_axis(axes: Axes, times: NDArray[np.int64], known: int) -> None:
    first = 1 - known
    axes.set_xlim(first - 1, len(times) - known + 1)
    ticks, labels = time_ticks(times)
    axes.set_xticks([first + i for i in ticks], labels)
    axes.set_xlabel("bar open, UTC", color=_FAINT, fontsize=9)


def time_ticks(times: NDArray[np.int64]) -> tuple[list[int], list[str]]:
    """Indices and labels of the ticks, for bars that open at ``times`` (N,), UTC ms.

    The first bar of every round period has a tick; its label has the date where that changes.
    """
    for step in _TICK_STEPS:
        periods = times // step
        ticks = (np.flatnonzero(np.diff(periods)) + 1).tolist()
        if len(ticks) <= _MAX_TICKS:
            break
    opens = [datetime.fromtimestamp(int(times[i]) / 1000, UTC) for i in ticks]
    if step >= _DAY:
        form = "%d %b %Y" if step < 28 * _DAY else "%b %Y"
        return ticks, [o.strftime(form) for o in opens]
    clock = "%H:%M" if step >= _MINUTE else "%H:%M:%S"
    labels = []
    for i, opened in enumerate(opens):
        new_day = i == 0 or opened.date() != opens[i - 1].date()
        labels.append(opened.strftime(f"{clock}\n%d %b %Y" if new_day else clock))
    return ticks, labels


def _titles(axes: Axes, fan: Fan, subtitle: str) -> None:
    origin = datetime.fromtimestamp(fan.origin / 1000, UTC).strftime("%d %b %Y %H:%M UTC")
    summary = fan.summary()
    change = summary.expected_return
    details = f"origin {origin}   P(up) {100 * summary.p_up:.0f} %" + (
        "" if change is None else f"   expected return {100 * change:+.2f} %"
    )
    named = fan.series.endswith(str(fan.timeframe))
    title = fan.series if named else f"{fan.series}   {fan.timeframe}"
    _annotate(axes, title, above=38, size=15, colour=_INK, weight="bold")
    _annotate(axes, details, above=22, size=10, colour=_INK)
    _annotate(axes, subtitle, above=8, size=9, colour=_FAINT)


def _annotate(
    axes: Axes, text: str, *, above: int, size: int, colour: str, weight: str = "normal"
) -> None:
    axes.annotate(
        text,
        (0, 1),
        (0, above),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=size,
        fontweight=weight,
        color=colour,
        parse_math=False,  # a dollar sign in a name does not start a formula
    )


def _style_axes(axes: Axes) -> None:
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=_FAINT, labelsize=9)


def _compact_number(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"
