"""What ccxt's rows mean: ``[open time, open, high, low, close, volume]``, and in what pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kronos_stream.market.candle import Candle
from kronos_stream.market.timeframe import Timeframe

_SKEW_MS = 2_000
"""How far an exchange's clock may be ahead of ours; a bar that opens later is none."""

_LATEST = 7_258_118_400_000
"""The year 2200; no bar opens later."""


class RowError(ValueError):
    """No row of a candle; one clause for people."""


def read_row(row: object) -> Candle | None:
    """The candle of a row; None where the exchange has no prices, as nothing was traded.

    Numbers may still be impossible. Raises RowError.
    """
    if not isinstance(row, Sequence) or isinstance(row, str) or len(row) < 6:
        raise RowError(f"a candle cannot be {row!r:.80}")
    time, *numbers = row[:6]
    if isinstance(time, float) and time.is_integer():
        time = int(time)
    if type(time) is not int or not 0 < time < _LATEST:
        raise RowError(f"a candle cannot open at {time!r:.40}")
    if all(number is None for number in numbers[:4]):
        return None
    if any(type(number) not in {int, float} for number in numbers):
        raise RowError(f"a candle cannot have the numbers {numbers!r:.80}")
    return Candle(time, *map(float, numbers))


class PushDiff:
    """What has been pushed of one series: tells apart what is new in what ccxt keeps."""

    def __init__(self) -> None:
        self._known: dict[int, Candle] = {}

    def changed(self, rows: Iterable[object], now: int) -> list[Candle]:
        """The newest candle, and older ones that have changed; the newest last, by UTC ms ``now``.

        What makes no sense is passed over: ccxt tells it again and again. Raises RowError where
        nothing else is there.
        """
        candles: dict[int, Candle] = {}
        fault: RowError | None = None
        for row in rows:
            try:
                candle = read_row(row)
            except RowError as error:
                fault = error
                continue
            if candle is not None and candle.time <= now + _SKEW_MS:
                candles[candle.time] = candle
        if not candles and fault is not None:
            raise fault
        newest = max(candles, default=0)
        before, self._known = self._known, candles
        return [
            candles[time]
            for time in sorted(candles)
            if time == newest or candles[time] != before.get(time)
        ]


class Page(NamedTuple):
    """What to ask for: ``limit`` rows from ``since``, UTC ms, on."""

    since: int
    limit: int


class Paginator:
    """Goes through an exchange's history, whatever the exchange makes of ``since`` and ``limit``.

    Some answer with fewer rows than they have, with rows of other times, or count intervals
    without trades; so the end is reached only when all time has been asked for.
    """

    def __init__(self, timeframe: Timeframe, start: int, end: int, max_rows: int) -> None:
        """Of the bars with start <= open < end, UTC ms; ``most`` rows at a time."""
        self._timeframe, self._since, self._end, self._max_rows = timeframe, start, end, max_rows
        self._step = timeframe.min_milliseconds
        self._found: dict[int, Candle] = {}

    @property
    def candles(self) -> list[Candle]:
        """The closed bars found so far, ascending."""
        return [self._found[time] for time in sorted(self._found)]

    def next_page(self) -> Page | None:
        """What to ask for next; None when all is known."""
        if self._since >= self._end:
            return None
        bars = (self._end - self._since - 1) // self._step + 1
        # One more: some leave out the first or the last.
        return Page(self._since, min(bars + 1, self._max_rows))

    def add(self, page: Page, rows: Iterable[object], now: int) -> None:
        """Take in the answer; at the venue it was certainly ``now``, UTC ms, when it was asked.

        A bar that was still open then is left out. Raises RowError.
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
        # Without any row it may be that nothing was traded in the time that the page spans.
        self._since = after(self._since, page.limit) if last is None else after(last)
