"""Counts of bar outcomes, for the figures of ``demo`` and ``replay``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kronos_stream.daemon.requests import ForecastResult


class OutcomeCounts:
    """Closed bars by outcome: a forecast, or the reason why it was skipped."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, results: Sequence[ForecastResult]) -> None:
        self._counts.update(result.reason or "forecast" for result in results)

    @property
    def bars(self) -> int:
        return self._counts.total()

    @property
    def forecasts(self) -> int:
        return self._counts["forecast"]

    def to_dict(self) -> dict[str, int]:
        return dict(self._counts)

    def skipped(self) -> dict[str, int]:
        """Skipped bars by reason, in alphabetical order."""
        return {name: n for name, n in sorted(self._counts.items()) if name != "forecast"}


def format_skipped(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in skipped.items())
