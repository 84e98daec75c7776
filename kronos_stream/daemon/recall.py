"""What the state file knows of a series, when the daemon takes it up again."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from kronos_stream.daemon.due import Due
from kronos_stream.daemon.state import State
from kronos_stream.market.candle import Bar
from kronos_stream.market.contexts import Window, build_window
from kronos_stream.market.series import Series

_AT_A_TIME = 256


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


async def without_outcome(
    state: State, series: Series, newest: Sequence[Bar], mark: tuple[int, int]
) -> list[Bar]:
    """All saved bars after ``mark``, and the newest if it has been revised since.

    newest: the newest saved bars, at least one.
    """
    known = deque(newest)
    while known[0].candle.time > mark[0]:
        older = await state.load(series, _AT_A_TIME, known[0].candle.time - 1)
        if not older:
            break
        known.extendleft(reversed(older))
    last = newest[-1]
    revised = last.candle.time == mark[0] and last.revision > mark[1]
    return [last] if revised else [bar for bar in known if bar.candle.time > mark[0]]


async def saved_window(state: State, due: Due, lookback: int) -> Window | None:
    """What ``due`` was to be forecast from; None if that is gone."""
    bars = await newest_bars(state, due.series, lookback, due.origin)
    if not bars or bars[-1].candle.time != due.origin:
        return None
    return build_window(due.series, bars)
