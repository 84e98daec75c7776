"""Contexts of saved bars, and the forecast requests that new bars trigger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import structlog

from kronos_stream.bars.contexts import ContextBuffer
from kronos_stream.bars.effects import NEVER, Append, Begin, Revise
from kronos_stream.bars.window import Window
from kronos_stream.daemon.expected_closes import ExpectedCloses
from kronos_stream.daemon.intake.recovery import bars_without_outcome, load_window
from kronos_stream.daemon.intake.save_queue import Change
from kronos_stream.daemon.intake.series_state import SeriesState
from kronos_stream.daemon.requests import ForecastRequest
from kronos_stream.daemon.storage.state import State
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.market.candle import Bar
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_log = structlog.get_logger()

CONTEXT_MARGIN = 64
"""Bars kept in memory beyond the lookback, for forecasts that are computed late."""


class SavedBars:
    """Saved bars of the followed series, as many as windows need."""

    def __init__(
        self,
        state: State,
        clock: Clock,
        metrics: Metrics,
        *,
        lookback: int,
        degraded: Literal["forecast", "skip"] = "forecast",
    ) -> None:
        """degraded: "skip" sets a skip reason while bars of the context are missing."""
        self.state, self.lookback, self.capacity = state, lookback, lookback + CONTEXT_MARGIN
        self._clock, self._metrics, self._strict = clock, metrics, degraded == "skip"
        self._contexts: dict[Series, ContextBuffer] = {}
        self._expected_closes: ExpectedCloses[SeriesState] = ExpectedCloses()

    async def window(self, request: ForecastRequest) -> Window | None:
        """Window to forecast a request from; None if its bars are no longer kept."""
        context = self._contexts.get(request.series)
        window = None if context is None else context.window(request.origin, self.lookback)
        return window or await load_window(self.state, request, self.lookback)

    def outstanding_bars(self, close: int) -> int:
        """Live series whose bar that closes at ``close``, UTC ms, was not added yet."""
        return sum(one.sequencer.live for one in self._expected_closes.pending(close))

    async def load(
        self, one: SeriesState, bars: Sequence[Bar], *, outdated: bool
    ) -> Sequence[ForecastRequest]:
        """Take over bars of the state file; return requests for those without an outcome.

        outdated: the next bar to come does not continue them.
        """
        series, watermark, requests = one.series, one.watermark, []
        complete = len(bars) >= self.lookback
        known = bars if complete or outdated else ()
        self._contexts[series] = ContextBuffer(series, self.capacity, known, complete=not complete)
        if watermark is not None and (complete or outdated):
            undecided = await bars_without_outcome(self.state, series, bars, watermark)
            requests = [request for bar in undecided if (request := self._request(one, bar))]
            one.watermark = bars[-1].candle.time, bars[-1].revision
        elif watermark is not None and bars and bars[-1].candle.time > watermark[0]:
            one.watermark = watermark[0], NEVER  # no revision of that bar is forecast any more
        if outdated:
            _log.info("absent for too long; old bars are not continued", series=series.name)
            one.watermark = None
            self._contexts[series] = ContextBuffer(series, self.capacity)
        elif complete:
            self._expected_closes.expect(one, series.timeframe.after(bars[-1].candle.time, 2))
        return requests

    def remove(self, one: SeriesState) -> None:
        """Drop a series that is no longer followed."""
        self._expected_closes.discard(one)
        self._contexts.pop(one.series, None)

    def apply(self, one: SeriesState, change: Change) -> ForecastRequest | None:
        """Add a change that was saved; return the request that it triggers, if any."""
        if isinstance(change, Begin):
            one.watermark = one.watermark or (change.origin, 0)
            return None
        series, bar = one.series, change.bar
        if isinstance(change, Append):
            self._contexts[series].append(bar)
            one.closed_bars.inc()
            if bar.synthetic:
                self._metrics.synthetic_bars.labels(series.venue).inc()
            self._expected_closes.expect(one, series.timeframe.after(bar.candle.time, 2))
            return self._request(one, bar)
        self._contexts[series].revise(bar)
        if not isinstance(change, Revise):
            return None
        age = "newest" if change.newest else "older"
        self._metrics.revisions.labels(series.venue, age).inc()
        _log.info("bar revised", series=series.name, time=bar.candle.time, age=age)
        return self._request(one, bar) if change.newest else None

    def _request(self, one: SeriesState, bar: Bar) -> ForecastRequest | None:
        """Request for a bar after the watermark."""
        place = bar.candle.time, bar.revision
        if one.watermark is None or place <= one.watermark:
            return None
        one.watermark = place
        close = one.series.timeframe.after(bar.candle.time)
        # Bars can arrive before their close by our clock; placeholders have no arrival.
        received = max(close, bar.received or self._clock.now())
        skip_reason = self._contexts[one.series].skip_reason(self.lookback, strict=self._strict)
        return ForecastRequest(one.series, *place, close, received, skip_reason)
