"""Timeframes in ccxt's notation: ``1s``, ``5m``, ``4h``, ``1d``, ``1w``, ``1M``."""

from __future__ import annotations

import re
from calendar import monthrange
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Self

HOUR_MS, DAY_MS = 3_600_000, 86_400_000

_UNIT_MS = {"s": 1_000, "m": 60_000, "h": HOUR_MS, "d": DAY_MS, "w": 7 * DAY_MS}
_EPOCH = date(1970, 1, 1)


@dataclass(frozen=True, slots=True)
class Timeframe:
    """Length of a bar: ``count`` times ``unit``; months have no fixed length."""

    count: int
    unit: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a text such as ``"5m"``; raises ValueError naming the accepted forms."""
        match = re.fullmatch(r"([1-9][0-9]{0,5})([smhdwM])", text)
        if match is None:
            raise ValueError(
                f"timeframe {text!r}: expected a count and a unit of s, m, h, d, w or M, such as 5m"
            )
        return cls(int(match[1]), match[2])

    @classmethod
    def from_step(cls, step_ms: int) -> Self:
        """Timeframe of bars ``step_ms`` apart, in its largest whole unit."""
        for unit, size in reversed(_UNIT_MS.items()):
            if step_ms >= size and step_ms % size == 0:
                return cls(step_ms // size, unit)
        raise ValueError(f"no timeframe has bars {step_ms} ms apart")

    def __str__(self) -> str:
        return f"{self.count}{self.unit}"

    @property
    def milliseconds(self) -> int | None:
        """Length of a bar in ms, None for months."""
        size = _UNIT_MS.get(self.unit)
        return None if size is None else self.count * size

    @property
    def min_milliseconds(self) -> int:
        """Length of the shortest bar in ms: 28 days for a month."""
        return self.milliseconds or self.count * 28 * DAY_MS

    def after(self, open_ms: int, bars: int = 1) -> int:
        """Open time, UTC ms, of the bar ``bars`` after the one that opens at ``open_ms``.

        Months keep the day and the time of day. After an open on the last day of a month all are
        (midnight east of Greenwich is the evening before in UTC); a day that the target month
        lacks becomes its last.
        """
        step = self.milliseconds
        if step is not None:
            return open_ms + bars * step
        days, time_of_day = divmod(open_ms, DAY_MS)
        opened = _EPOCH + timedelta(days)
        year, month = divmod(opened.year * 12 + opened.month - 1 + bars * self.count, 12)
        last = monthrange(year, month + 1)[1]
        at_end = opened.day == monthrange(opened.year, opened.month)[1]
        day = last if at_end else min(opened.day, last)
        return (date(year, month + 1, day) - _EPOCH).days * DAY_MS + time_of_day

    def bars_between(self, open_ms: int, later_ms: int) -> int:
        """Number of bars that open after ``open_ms``, an open, up to ``later_ms``."""
        # With the shortest month as divisor, the quotient is never too small.
        bars = (later_ms - open_ms) // self.min_milliseconds
        while self.after(open_ms, bars) > later_ms:
            bars -= 1
        return bars

    def has_open(self, time: int, anchor: int | None) -> bool:
        """Return whether a bar opens at ``time``, UTC ms; ``anchor``: any known open of a bar.

        Bars up to an hour divide the UTC day. Longer ones follow the venue, whose day need not
        begin at midnight UTC, nor its week on a Monday: without anchor any time is accepted.
        """
        step = self.milliseconds
        if time < 0:
            return False
        if step is not None and step <= HOUR_MS and DAY_MS % step == 0:
            return time % step == 0
        if anchor is None:
            return True
        first, last = sorted((time, anchor))
        return self.after(first, self.bars_between(first, last)) == last
