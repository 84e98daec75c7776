"""State of one followed series."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import Counter

from kronos_stream.bars.effects import NEVER
from kronos_stream.bars.sequencer import BarSequencer
from kronos_stream.market.series import Series


@dataclass(slots=True, eq=False)
class SeriesState:
    """A series, its sequencer, and how far its bars were handed on."""

    series: Series
    sequencer: BarSequencer
    watermark: tuple[int, int] | None
    """Open, UTC ms, and revision of the newest bar that was handed on; None before the first."""
    closed_bars: Counter
    timer_at: int = NEVER
    """UTC ms at which its timer is set."""
