"""Grid of the times at which bars open."""

from __future__ import annotations

from kronos_stream.market.timeframe import DAY_MS, HOUR_MS, Timeframe


class Grid:
    """Opens of a timeframe's bars, UTC ms.

    Bars up to an hour divide the UTC day. Longer ones follow the venue, whose day need not begin
    at midnight UTC, nor its week on a Monday: any known open of a bar is the anchor.
    """

    __slots__ = ("_fixed", "step", "timeframe")

    def __init__(self, timeframe: Timeframe) -> None:
        self.timeframe = timeframe
        self.step = timeframe.milliseconds
        """Length of a bar in ms, None for months."""
        self._fixed = self.step is not None and self.step <= HOUR_MS and DAY_MS % self.step == 0

    def after(self, time: int) -> int:
        """Close of the bar that opens at ``time``, and open of the next."""
        return self.timeframe.after(time) if self.step is None else time + self.step

    def before(self, time: int, bars: int = 1) -> int:
        return self.timeframe.after(time, -bars)

    def has(self, time: int, anchor: int | None) -> bool:
        """Return whether a bar opens at ``time``; ``anchor``: the open of any bar, if known."""
        if time < 0:
            return False
        if self.step is not None and self._fixed:
            return time % self.step == 0
        if anchor is None:
            return True
        first, last = sorted((time, anchor))
        return self.timeframe.after(first, self.timeframe.bars_between(first, last)) == last
