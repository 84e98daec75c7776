"""Forecast requests, one per closed bar, and their results."""

from __future__ import annotations

from typing import Literal, NamedTuple

from kronos_stream.bars.window import Window
from kronos_stream.forecast.outlook import Outlook
from kronos_stream.market.series import Series


class ForecastRequest(NamedTuple):
    """A closed bar to forecast from, saved and in its context; it gets exactly one outcome."""

    series: Series
    origin: int
    """Open of the bar, UTC ms."""
    revision: int
    close: int
    """Close of the bar, UTC ms; the open of the next one."""
    received: int
    """Arrival of the bar's last update, UTC ms."""
    skip_reason: str | None = None
    """Reason why it cannot be forecast: "gap" or "warming up"."""


class Outcome(NamedTuple):
    """Result of a request as it is recorded and counted."""

    series: str
    origin: int
    revision: int
    result: Literal["forecast", "skipped"]
    reason: str = ""
    """Reason of a skip: overrun, revised, gap, warming up, stale, failed or removed."""


class ForecastResult(NamedTuple):
    """Result of a request, with the forecast if there is one."""

    request: ForecastRequest
    window: Window | None = None
    outlook: Outlook | None = None
    reason: str = ""
    """As of :class:`Outcome`; empty for a forecast."""
    scale: float = 1.0
    """Factor applied to prices for the model."""
    queued_ms: int = 0
    """From the bar's arrival to the start of its batch."""
    compute_ms: int = 0
    """Duration of its batch in the worker."""

    @property
    def outcome(self) -> Outcome:
        request = self.request
        return Outcome(
            request.series.name,
            request.origin,
            request.revision,
            "skipped" if self.outlook is None else "forecast",
            self.reason,
        )
