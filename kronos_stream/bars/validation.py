"""What of a venue's words can be true: impossible candles and early words stay outside."""

from __future__ import annotations

from collections.abc import Sequence

from kronos_stream.bars.effects import Effect, Fetch, Reject
from kronos_stream.market.candle import Candle
from kronos_stream.market.grid import Grid

_SKEW_MS = 2_000
"""How far the venue's clock may be ahead of ours; what is further ahead is not the clocks' fault.
A bar said to be closed within that is for the tape to hold until its close."""


class CandleValidator:
    """One series' border. Times are UTC ms."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._last_rejected = -1

    def invalid_reason(
        self, candle: Candle, now: int, anchor: int | None, *, closed: bool
    ) -> str | None:
        """Why ``candle`` cannot be, or None; an open bar's values are not looked at.

        anchor: the open of any other bar, if one is known.
        """
        time = candle.time
        if time > now + _SKEW_MS:
            return f"opens {(time - now) / 1000:g} s from now"
        if not self._grid.has(time, anchor):
            return f"no bar of {self._grid.timeframe} opens at {time}"
        if not closed:
            return None
        early = self._grid.after(time) - now
        if early > _SKEW_MS:
            return f"said to be closed {early / 1000:g} s before its close"
        return candle.invalid_reason()

    def reject(self, candle: Candle, reason: str, effects: list[Effect]) -> None:
        """Say so, once: the same bar is pushed and asked for many times."""
        if candle.time != self._last_rejected:
            self._last_rejected = candle.time
            effects.append(Reject(candle, reason))

    def filter_valid(
        self,
        request: Fetch,
        candles: Sequence[Candle],
        now: int,
        anchor: int | None,
        effects: list[Effect],
    ) -> dict[int, Candle]:
        """What of an answer can be, by open; the rest is rejected."""
        given: dict[int, Candle] = {}
        for candle in candles:
            fault = self.invalid_reason(candle, now, anchor, closed=True)
            if fault is None and not request.start <= candle.time < request.end:
                fault = "not what was asked for"
            if fault is None:
                given[candle.time] = candle
                anchor = candle.time if anchor is None else anchor
            else:
                self.reject(candle, fault, effects)
        return given
