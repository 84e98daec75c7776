"""Timeframes in ccxt's notation: ``1s``, ``5m``, ``4h``, ``1d``, ``1w``, ``1M``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

_UNIT_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 7 * 86_400_000}


@dataclass(frozen=True, slots=True)
class Timeframe:
    """The length of a bar: ``count`` of ``unit``; months have no fixed length."""

    count: int
    unit: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``"5m"``; raises ValueError naming the accepted forms."""
        match = re.fullmatch(r"([1-9]\d{0,5})([smhdwM])", text)
        if match is None:
            raise ValueError(
                f"timeframe {text!r}: expected a count and a unit of s, m, h, d, w or M, such as 5m"
            )
        return cls(int(match[1]), match[2])

    @classmethod
    def from_step(cls, step_ms: int) -> Self:
        """The timeframe of bars ``step_ms`` apart, in its largest whole unit."""
        for unit, size in reversed(_UNIT_MS.items()):
            if step_ms >= size and step_ms % size == 0:
                return cls(step_ms // size, unit)
        raise ValueError(f"no timeframe has bars {step_ms} ms apart")

    def __str__(self) -> str:
        return f"{self.count}{self.unit}"

    @property
    def milliseconds(self) -> int | None:
        """Length of a bar in ms, None for months."""
        size = _UNIT_MS.get(self.unit)
        return None if size is None else self.count * size

    def after(self, open_ms: int, bars: int = 1) -> int:
        """Open time, UTC ms, of the bar ``bars`` after the one that opens at ``open_ms``."""
        step = self.milliseconds
        if step is not None:
            return open_ms + bars * step
        opened = datetime.fromtimestamp(open_ms / 1000, UTC)
        months = opened.year * 12 + opened.month - 1 + bars * self.count
        first = opened.replace(year=months // 12, month=months % 12 + 1, day=1)
        return int(first.timestamp() * 1000) + (opened.day - 1) * _UNIT_MS["d"]
