"""What the state file knows of a series, when the daemon takes it up again."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from kronos_stream.bars.window import Window, build_window
from kronos_stream.daemon.requests import ForecastRequest
from kronos_stream.daemon.storage.state import State
from kronos_stream.market.candle import Bar
from kronos_stream.market.series import Series

_PAGE_SIZE = 256


async def newest_bars(
    state: State, series: Series, bars: int, until: int | None = None
) -> list[Bar]:
    """The newest saved bars that open at ``until`` or before, up to the first hole behind them."""
    saved = await state.load(series, bars, until)
    after = series.timeframe.after
    first = len(saved) - 1
    while first > 0 and after(saved[first - 1].candle.time) == saved[first].candle.time:
        first -= 1
    return saved[max(first, 0) :]


async def bars_without_outcome(
    state: State, series: Series, newest: Sequence[Bar], watermark: tuple[int, int]
) -> list[Bar]:
    """All saved bars after ``mark``, and the newest if it has been revised since.

    newest: the newest saved bars, at least one.
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


async def load_window(state: State, request: ForecastRequest, lookback: int) -> Window | None:
    """What ``due`` was to be forecast from; None if that is gone."""
    bars = await newest_bars(state, request.series, lookback, request.origin)
    if not bars or bars[-1].candle.time != request.origin:
        return None
    return build_window(request.series, bars)
