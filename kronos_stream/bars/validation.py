"""Candle validation: rejects impossible values and times."""

from __future__ import annotations

from collections.abc import Sequence

from kronos_stream.bars.effects import Effect, Fetch, Reject
from kronos_stream.market.candle import Candle
from kronos_stream.market.timeframe import Timeframe

_SKEW_MS = 2_000
"""Tolerance between the venue's clock and ours. The sequencer holds a bar reported closed within
it until its close."""


class CandleValidator:
    """Validator of one series. Times are UTC ms."""

    def __init__(self, timeframe: Timeframe) -> None:
        self._timeframe = timeframe
        self._last_rejected = -1

    def invalid_reason(
        self, candle: Candle, now: int, anchor: int | None, *, closed: bool
    ) -> str | None:
        """Return why ``candle`` is invalid, or None; values of an open bar are not checked.

        anchor: the open of any other bar, if one is known.
        """
        time = candle.time
        if time > now + _SKEW_MS:
            return f"opens {(time - now) / 1000:g} s in the future"
        if not self._timeframe.has_open(time, anchor):
            return f"no bar of {self._timeframe} opens at {time}"
        if not closed:
            return None
        early = self._timeframe.after(time) - now
        if early > _SKEW_MS:
            return f"reported closed {early / 1000:g} s before its close"
        return candle.invalid_reason()

    def reject(self, candle: Candle, reason: str, effects: list[Effect]) -> None:
        """Report an invalid candle once: the same one may come many times."""
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
        """Valid candles of an answer, by open; the others are rejected."""
        valid: dict[int, Candle] = {}
        for candle in candles:
            reason = self.invalid_reason(candle, now, anchor, closed=True)
            if reason is None and not request.start <= candle.time < request.end:
                reason = "outside the requested range"
            if reason is None:
                valid[candle.time] = candle
                anchor = candle.time if anchor is None else anchor
            else:
                self.reject(candle, reason, effects)
        return valid
