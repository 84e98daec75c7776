"""Missing bars: answers of the history without them, and placeholders in their place."""

from __future__ import annotations

from collections.abc import Container

from kronos_stream.bars.effects import Fetch
from kronos_stream.market.candle import Bar


class MissingBars:
    """Times are UTC ms. A placeholder is a synthetic bar that was never received.

    It stands for a bar while the venue's history cannot be reached.
    """

    def __init__(self, answers: int, limit: int) -> None:
        """answers: those without a bar, after which it does not exist. limit: most placeholders."""
        self._answers, self._limit = answers, limit
        self._absences: dict[int, int] = {}
        self._placeholders: dict[int, Bar] = {}

    def __len__(self) -> int:
        """Number of placeholders."""
        return len(self._placeholders)

    def get(self, time: int) -> Bar | None:
        return self._placeholders.get(time)

    def oldest(self, count: int) -> list[int]:
        """Opens of the oldest placeholders."""
        return list(self._placeholders)[:count]

    def add(self, bar: Bar) -> None:
        """Add a placeholder."""
        self._placeholders[bar.candle.time] = bar
        if len(self._placeholders) > self._limit:
            del self._placeholders[next(iter(self._placeholders))]

    def resolve(self, time: int) -> None:
        """Forget a bar that has been confirmed, real or synthetic."""
        self._absences.pop(time, None)
        self._placeholders.pop(time, None)

    def record_absence(self, time: int) -> None:
        """Count an answer of the history without the bar."""
        self._absences[time] = self._absences.get(time, 0) + 1

    def confirmed(self, time: int) -> bool:
        """Return whether enough answers came without the bar."""
        return self._absences.get(time, 0) >= self._answers

    def confirm_placeholders(self, request: Fetch, history: Container[int], now: int) -> list[Bar]:
        """Remove and return the placeholders whose bars, after this answer, do not exist."""
        confirmed = []
        for time, bar in list(self._placeholders.items()):
            if request.start <= time < request.end and time not in history:
                self.record_absence(time)
                if self.confirmed(time):
                    self.resolve(time)
                    confirmed.append(bar._replace(received=now))
        return confirmed
