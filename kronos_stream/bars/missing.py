"""Bars that a tape lacks: how often the history answered without them, and what was made up."""

from __future__ import annotations

from collections.abc import Container

from kronos_stream.bars.effects import Fetch
from kronos_stream.market.candle import Bar


class MissingBars:
    """Times are UTC ms. A bar is owed while it is only made up: nobody said that it is not there.

    On the tape such a bar is synthetic and was never received.
    """

    def __init__(self, answers: int, most: int) -> None:
        """answers: without a bar, until it does not exist. most: bars owed; older are let go."""
        self._answers, self._limit = answers, most
        self._absences: dict[int, int] = {}
        self._placeholders: dict[int, Bar] = {}

    def __len__(self) -> int:
        return len(self._placeholders)

    def get(self, time: int) -> Bar | None:
        return self._placeholders.get(time)

    def oldest(self, most: int) -> list[int]:
        """Opens of bars to ask for first."""
        return list(self._placeholders)[:most]

    def add(self, bar: Bar) -> None:
        self._placeholders[bar.candle.time] = bar
        if len(self._placeholders) > self._limit:
            del self._placeholders[next(iter(self._placeholders))]

    def resolve(self, time: int) -> None:
        """The bar is there, real or not: nothing more to ask."""
        if self._absences:
            self._absences.pop(time, None)
        if self._placeholders:
            self._placeholders.pop(time, None)

    def record_absence(self, time: int) -> None:
        """The history answered without the bar."""
        self._absences[time] = self._absences.get(time, 0) + 1

    def confirmed(self, time: int) -> bool:
        """Whether the history has said so often enough."""
        return self._absences.get(time, 0) >= self._answers

    def confirm_placeholders(self, request: Fetch, history: Container[int], now: int) -> list[Bar]:
        """The bars owed that do not exist, now that this answer has come; they are paid for."""
        settled = []
        for time, bar in list(self._placeholders.items()):
            if request.start <= time < request.end and time not in history:
                self.record_absence(time)
                if self.confirmed(time):
                    self.resolve(time)
                    settled.append(bar._replace(received=now))
        return settled
