"""Bars and positions of a series read back from the state file."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from kronos_stream.bars.window import Window, build_window
from kronos_stream.daemon.requests import ForecastRequest
from kronos_stream.daemon.storage.state import PublishedBar, State
from kronos_stream.market.candle import Bar
from kronos_stream.market.series import Series

_PAGE_SIZE = 256


async def load_watermark(
    state: State, series: Series, bars: Sequence[Bar]
) -> tuple[int, int] | None:
    """Open, UTC ms, and revision of the newest bar with an outcome; None before the first bar.

    bars: newest saved bars. The newest becomes the watermark if bars were saved without one.
    """
    watermark = await state.watermark(series)
    if bars and watermark is None:
        watermark = bars[-1].candle.time, 0
        await state.init_watermark(series, watermark[0])
    return watermark


async def newest_bars(
    state: State, series: Series, bars: int, until: int | None = None
) -> list[Bar]:
    """Newest ``bars`` consecutive saved bars that open at ``until`` or before, UTC ms."""
    saved = await state.load(series, bars, until)
    after = series.timeframe.after
    first = len(saved) - 1
    while first > 0 and after(saved[first - 1].candle.time) == saved[first].candle.time:
        first -= 1
    return saved[max(first, 0) :]


async def bars_without_outcome(
    state: State, series: Series, newest: Sequence[Bar], watermark: tuple[int, int]
) -> list[Bar]:
    """Saved bars after ``watermark``, and the newest bar if it was revised since its outcome.

    newest: newest saved bars, at least one.
    """
    known = deque(newest)
    while known[0].candle.time > watermark[0]:
        older = await state.load(series, _PAGE_SIZE, known[0].candle.time - 1)
        if not older:
            break
        known.extendleft(reversed(older))
    last = newest[-1]
    revised = last.candle.time == watermark[0] and last.revision > watermark[1]
    return [last] if revised else [bar for bar in known if bar.candle.time > watermark[0]]


async def bars_not_relayed(
    state: State, series: Series, bars: Sequence[Bar], watermark: tuple[int, int] | None
) -> list[PublishedBar]:
    """Those of ``bars`` that were saved but never published to the candle topics."""
    since = await state.last_relayed(series)
    return [
        PublishedBar(
            series,
            bar,
            watermark is not None and (bar.candle.time, bar.revision) > watermark,
        )
        for bar in bars
        if bar.candle.time > since
    ]


async def load_window(state: State, request: ForecastRequest, lookback: int) -> Window | None:
    """Window of a request from saved bars; None if its bar is no longer saved."""
    bars = await newest_bars(state, request.series, lookback, request.origin)
    if not bars or bars[-1].candle.time != request.origin:
        return None
    return build_window(request.series, bars)
