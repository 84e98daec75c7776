"""Bars that a tape lacks: how often the history answered without them, and what was made up."""

from __future__ import annotations

from collections.abc import Container

from kronos_stream.market.candle import Bar
from kronos_stream.market.effects import Fetch


class Debts:
    """Times are UTC ms. A bar is owed while it is only made up: nobody said that it is not there.

    On the tape such a bar is synthetic and was never received.
    """

    def __init__(self, answers: int, most: int) -> None:
        """answers: without a bar, until it does not exist. most: bars owed; older are let go."""
        self._answers, self._most = answers, most
        self._absent: dict[int, int] = {}
        self._owed: dict[int, Bar] = {}

    def __len__(self) -> int:
        return len(self._owed)

    def get(self, time: int) -> Bar | None:
        return self._owed.get(time)

    def oldest(self, most: int) -> list[int]:
        """Opens of bars to ask for first."""
        return list(self._owed)[:most]

    def owe(self, bar: Bar) -> None:
        self._owed[bar.candle.time] = bar
        if len(self._owed) > self._most:
            del self._owed[next(iter(self._owed))]

    def pay(self, time: int) -> None:
        """The bar is there, real or not: nothing more to ask."""
        if self._absent:
            self._absent.pop(time, None)
        if self._owed:
            self._owed.pop(time, None)

    def absent(self, time: int) -> None:
        """The history answered without the bar."""
        self._absent[time] = self._absent.get(time, 0) + 1

    def gone(self, time: int) -> bool:
        """Whether the history has said so often enough."""
        return self._absent.get(time, 0) >= self._answers

    def settle(self, asked: Fetch, given: Container[int], now: int) -> list[Bar]:
        """The bars owed that do not exist, now that this answer has come; they are paid for."""
        settled = []
        for time, bar in list(self._owed.items()):
            if asked.start <= time < asked.end and time not in given:
                self.absent(time)
                if self.gone(time):
                    self.pay(time)
                    settled.append(bar._replace(received=now))
        return settled
