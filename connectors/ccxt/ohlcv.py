"""Rows of ccxt, ``[open time, open, high, low, close, volume]``, and the paging of history."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kronos_stream.market.candle import MAX_TIME_MS, Candle
from kronos_stream.market.timeframe import Timeframe

_SKEW_MS = 2_000
"""Tolerance for an exchange's clock that is ahead of ours; bars that open later are dropped."""


class RowError(ValueError):
    """Invalid row."""


def read_row(row: object) -> Candle | None:
    """Candle of a row; None if it has no prices, as nothing was traded.

    Prices are not checked here. Raises RowError.
    """
    if not isinstance(row, Sequence) or isinstance(row, str) or len(row) < 6:
        raise RowError(f"invalid row {row!r:.80}")
    time, *numbers = row[:6]
    if isinstance(time, float) and time.is_integer():
        time = int(time)
    if type(time) is not int or not 0 < time < MAX_TIME_MS:
        raise RowError(f"invalid open time {time!r:.40}")
    if all(number is None for number in numbers[:4]):
        return None
    if any(type(number) not in {int, float} for number in numbers):
        raise RowError(f"invalid numbers {numbers!r:.80}")
    return Candle(time, *map(float, numbers))


class PushDiff:
    """Finds what has changed among the candles that ccxt keeps of a series."""

    def __init__(self) -> None:
        self._known: dict[int, Candle] = {}

    def changed(self, rows: Iterable[object], now: int) -> list[Candle]:
        """Older candles that have changed, then the newest one. ``now`` is UTC ms.

        Invalid rows are skipped, as ccxt returns them again and again. Raises RowError if there
        are no others.
        """
        candles: dict[int, Candle] = {}
        invalid: RowError | None = None
        for row in rows:
            try:
                candle = read_row(row)
            except RowError as error:
                invalid = error
                continue
            if candle is not None and candle.time <= now + _SKEW_MS:
                candles[candle.time] = candle
        if not candles and invalid is not None:
            raise invalid
        newest = max(candles, default=0)
        before, self._known = self._known, candles
        return [
            candles[time]
            for time in sorted(candles)
            if time == newest or candles[time] != before.get(time)
        ]


class Page(NamedTuple):
    """Request for ``limit`` rows from ``since``, UTC ms, on."""

    since: int
    limit: int


class Paginator:
    """Pages through an exchange's history, however it interprets ``since`` and ``limit``.

    Some return fewer rows than they have, rows of other times, or count intervals without trades
    as rows. So the end is reached only when the whole time span has been requested.
    """

    def __init__(self, timeframe: Timeframe, start: int, end: int, max_rows: int) -> None:
        """Request bars with start <= open < end, UTC ms, ``max_rows`` at a time."""
        self._timeframe, self._since, self._end, self._max_rows = timeframe, start, end, max_rows
        self._step = timeframe.min_milliseconds
        self._found: dict[int, Candle] = {}

    @property
    def candles(self) -> list[Candle]:
        """Closed bars found so far, ascending."""
        return [self._found[time] for time in sorted(self._found)]

    def next_page(self) -> Page | None:
        """Next page to request; None at the end."""
        if self._since >= self._end:
            return None
        bars = (self._end - self._since - 1) // self._step + 1
        # One more: some exchanges leave out the first or the last.
        return Page(self._since, min(bars + 1, self._max_rows))

    def add(self, page: Page, rows: Iterable[object], now: int) -> None:
        """Add the rows of a page, requested when the venue's time was at least ``now``, UTC ms.

        Bars still open then are left out. Raises RowError.
        """
        after = self._timeframe.after
        last: int | None = None
        for row in rows:
            candle = read_row(row)
            if candle is None or candle.time < self._since:
                continue
            last = candle.time if last is None else max(last, candle.time)
            if candle.time < self._end and after(candle.time) <= now:
                self._found[candle.time] = candle
        # Without rows, nothing was traded in the time that the page spans.
        self._since = after(self._since, page.limit) if last is None else after(last)
