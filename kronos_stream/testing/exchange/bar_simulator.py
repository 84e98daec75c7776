"""True bars of every instrument and timeframe, generated as time passes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from kronos_stream.market.timeframe import Timeframe
from kronos_stream.testing.exchange.frames import (
    AMOUNT,
    CLOSE,
    FIRST,
    HIGH,
    LOW,
    OPEN,
    TRADES,
    VOLUME,
    round_to_precision,
)
from kronos_stream.testing.exchange.instruments import BarFeed

Floats = npt.NDArray[np.float64]

DAY_MS = 86_400_000
END_OF_TIME = 2**62
"""Later than any bar, UTC ms."""
_MONDAY_MS = 4 * DAY_MS  # 1970-01-05
_LOTS_PER_TRADE = 300


def bar_open_time(timeframe: Timeframe, moment: int) -> int:
    """Open time (UTC ms) of the bar that contains ``moment``; weeks start on Monday."""
    step = timeframe.milliseconds
    if step is not None:
        anchor = _MONDAY_MS if timeframe.unit == "w" else 0
        return moment - (moment - anchor) % step
    when = datetime.fromtimestamp(moment // 1000, UTC)
    year, month = divmod((when.year * 12 + when.month - 1) // timeframe.count * timeframe.count, 12)
    return int(datetime(year, month + 1, 1, tzinfo=UTC).timestamp()) * 1000


class BarHistory:
    """The newest ``keep`` closed bars of one timeframe, and the current one."""

    def __init__(self, timeframe: Timeframe, instruments: int, keep: int) -> None:
        self.timeframe = timeframe
        self._keep = keep
        self._opens: list[int] = []
        self._bars = np.empty((keep + keep // 4 + 1, instruments, 8))
        self._current: Floats | None = None
        self.opened = 0
        """Open time of the current bar, UTC ms."""

    @property
    def closes(self) -> int:
        return self.timeframe.after(self.opened)

    @property
    def oldest(self) -> int:
        return self._opens[0] if self._opens else self.opened

    def add(self, opened: int, length: int, bars: Floats) -> int | None:
        """Add the base bars (instruments, 8) that opened at ``opened``.

        Returns the open time of the bar that they complete, or None.
        """
        if self._current is None or opened >= self.closes:
            self.opened, self._current = bar_open_time(self.timeframe, opened), bars
        else:
            self._current = merge_bars(self._current, bars)
        if opened + length < self.closes:
            return None
        finished = self.opened
        self._append(self._current)
        self.opened, self._current = self.closes, None
        return finished

    def _append(self, bars: Floats) -> None:
        count = len(self._opens)
        if count == len(self._bars):
            self._bars[: self._keep] = self._bars[count - self._keep :]
            del self._opens[: count - self._keep]
            count = self._keep
        self._bars[count] = bars
        self._opens.append(self.opened)

    def current_bar(self, base: Floats) -> Floats:
        """The current bar, with the unfinished base bar ``base`` merged into it."""
        return base if self._current is None else merge_bars(self._current, base)

    def bars(self, opened: int) -> Floats:
        """Closed bars (instruments, 8) that opened at ``opened``; a view, to be changed in place.

        Raises KeyError if they are not kept.
        """
        index = bisect_left(self._opens, opened)
        if index == len(self._opens) or self._opens[index] != opened:
            raise KeyError(opened)
        bars: Floats = self._bars[index]
        return bars

    def between(self, start: int, end: int) -> tuple[list[int], Floats]:
        """Open times from ``start`` to ``end``, ascending, and the bars (T, instruments, 8)."""
        first, last = bisect_left(self._opens, start), bisect_left(self._opens, end + 1)
        return self._opens[first:last], self._bars[first:last]


def merge_bars(earlier: Floats, later: Floats) -> Floats:
    """Merge two bars; where one is missing (NaN), take the other."""
    none, nothing = np.isnan(earlier[:, OPEN]), np.isnan(later[:, OPEN])
    bars = np.empty_like(earlier)
    bars[:, OPEN] = earlier[:, OPEN]
    bars[:, HIGH] = np.maximum(earlier[:, HIGH], later[:, HIGH])
    bars[:, LOW] = np.minimum(earlier[:, LOW], later[:, LOW])
    bars[:, CLOSE] = later[:, CLOSE]
    bars[:, VOLUME:FIRST] = earlier[:, VOLUME:FIRST] + later[:, VOLUME:FIRST]
    bars[:, FIRST] = earlier[:, FIRST]
    bars[none], bars[nothing] = later[none], earlier[nothing]
    return bars


class BarSimulator:
    """Histories of all timeframes over one feed, starting with ``history`` bars of the longest."""

    def __init__(
        self,
        feed: BarFeed,
        timeframes: Sequence[Timeframe],
        now: int,
        *,
        history: int,
        keep: int,
    ) -> None:
        base = self.base_ms = feed.timeframe_ms
        self._feed = feed
        self.on_close: Callable[[BarHistory, int], None] = lambda *_: None
        """Called for each closed bar with its history and its open time."""
        self.instruments = feed.instruments
        count = len(feed.instruments)
        self.histories = {str(t): BarHistory(t, count, keep) for t in timeframes}
        self._digits = np.array([i.digits for i in feed.instruments])
        self._tick = np.array([i.tick for i in feed.instruments])
        self._lot = np.array([i.lot for i in feed.instruments])
        self._trades = np.ones(count)
        longest = max(timeframes, key=lambda t: t.after(0))
        self.start = bar_open_time(longest, now)
        for _ in range(history):  # complete bars of the longest are complete bars of all
            self.start = bar_open_time(longest, self.start - 1)
        self.opened = self.start
        feed.begin(self.start, (now - self.start) // base)
        self._next_bars = self._generate()
        self.advance(now)

    def _generate(self) -> Floats:
        drawn = self._feed.step()
        bars = np.empty((len(drawn), 8))
        bars[:, :6] = drawn
        volume = np.nan_to_num(drawn[:, VOLUME])
        count = np.maximum(volume // (self._lot * _LOTS_PER_TRADE), volume > 0)
        bars[:, TRADES], bars[:, FIRST] = count, self._trades
        self._trades = self._trades + count
        self.round_bars(bars)
        return bars

    def round_bars(self, bars: Floats) -> None:
        """Round bars (instruments, 8) in place to the precision of their messages."""
        round_to_precision(bars, self._digits)

    def advance(self, now: int) -> None:
        """Close all bars that end by ``now``, UTC ms."""
        while self.opened + self.base_ms <= now:
            for history in self.histories.values():
                finished = history.add(self.opened, self.base_ms, self._next_bars)
                if finished is None:
                    continue
                self.round_bars(history.bars(finished))
                self.on_close(history, finished)
            self.opened += self.base_ms
            self._next_bars = self._generate()

    def current_bars(self, history: BarHistory, now: int) -> Floats:
        """Current bars (instruments, 8) of ``history`` at ``now``."""
        bars = history.current_bar(self._partial_bars((now - self.opened) / self.base_ms))
        self.round_bars(bars)
        return bars

    def _partial_bars(self, fraction: float) -> Floats:
        """Partial bars at a fraction of their time: from open over the extremes to close."""
        fraction = min(max(fraction, 0.0), 1.0)
        bars = self._next_bars.copy()
        opened, high, low, close, volume = bars[:, : VOLUME + 1].T.copy()
        traded = np.floor(volume * fraction / self._lot + 1e-6) * self._lot
        up = close >= opened
        corners = np.stack((opened, np.where(up, low, high), np.where(up, high, low), close))
        leg = min(int(fraction * 3), 2)
        price = corners[leg] + (corners[leg + 1] - corners[leg]) * (fraction * 3 - leg)
        price = np.clip(np.rint(price / self._tick) * self._tick, low, high)
        price = np.where(traded > 0, price, opened)
        seen = np.where(traded > 0, corners[: leg + 1], opened)
        bars[:, HIGH] = np.maximum(seen.max(0), price)
        bars[:, LOW] = np.minimum(seen.min(0), price)
        bars[:, CLOSE], bars[:, VOLUME] = price, traded
        part = np.divide(traded, volume, out=np.zeros_like(traded), where=volume > 0)
        bars[:, AMOUNT] *= part
        bars[:, TRADES] = np.maximum(np.floor(bars[:, TRADES] * part), traded > 0)
        return bars
