"""A closed bar that asks for a forecast, and what became of it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from kronos_stream.market.series import Series


class Due(NamedTuple):
    """A closed bar, saved and in its context; exactly one outcome is recorded for it."""

    series: Series
    origin: int
    """Open of the bar, UTC ms."""
    revision: int
    close: int
    """Close of the bar, UTC ms: open of the next."""
    received: int
    """UTC ms when the venue's last word on it arrived."""
    obstacle: str | None = None
    """Why it cannot be forecast ("gap", "warming up"), if so."""


class Outcome(NamedTuple):
    """What became of a due bar."""

    series: str
    origin: int
    revision: int
    result: Literal["forecast", "skipped"]
    reason: str = ""
    """Why it was skipped: overrun, revised, gap, warming up, stale, failed."""
