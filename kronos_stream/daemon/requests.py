"""A closed bar that asks for a forecast, and what became of it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from kronos_stream.bars.window import Window
from kronos_stream.forecast.outlook import Outlook
from kronos_stream.market.series import Series


class ForecastRequest(NamedTuple):
    """A closed bar, saved and in its context; exactly one outcome is recorded for it."""

    series: Series
    origin: int
    """Open of the bar, UTC ms."""
    revision: int
    close: int
    """Close of the bar, UTC ms: open of the next."""
    received: int
    """UTC ms when the venue's last word on it arrived."""
    skip_reason: str | None = None
    """Why it cannot be forecast ("gap", "warming up"), if so."""


class Outcome(NamedTuple):
    """What became of a due bar."""

    series: str
    origin: int
    revision: int
    result: Literal["forecast", "skipped"]
    reason: str = ""
    """Why it was skipped: overrun, revised, gap, warming up, stale, failed, removed."""


class ForecastResult(NamedTuple):
    """What became of a due bar, with the forecast if there is one."""

    request: ForecastRequest
    window: Window | None = None
    outlook: Outlook | None = None
    reason: str = ""
    """Why it was skipped; empty for a forecast."""
    scale: float = 1.0
    """What prices were multiplied with for the model."""
    queued_ms: int = 0
    """From the bar's arrival to the worker."""
    compute_ms: int = 0
    """What its batch took in the worker."""

    @property
    def as_removed(self) -> ForecastResult:
        """The same for a series that is followed no more."""
        return ForecastResult(self.request, reason="removed")

    @property
    def outcome(self) -> Outcome:
        due = self.request
        kind: Literal["forecast", "skipped"] = "skipped" if self.outlook is None else "forecast"
        return Outcome(due.series.name, due.origin, due.revision, kind, self.reason)
