"""Instruments of the simulated exchange: generated markets, or candles of files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import log10
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kronos_stream.market.candle_files import CandleFileError, CandleTable, read_candles
from kronos_stream.testing.market import Market

Floats = npt.NDArray[np.float64]

_QUOTES = ("USDT", "USDC", "FDUSD", "TRY", "EUR", "BTC", "ETH", "BNB", "USD")


@dataclass(frozen=True, slots=True)
class Instrument:
    """One coin against another; ``tick`` and ``lot`` are the steps of its price and volume."""

    base: str
    quote: str
    perpetual: bool
    tick: float
    lot: float

    @property
    def name(self) -> str:
        """Name in the venue's notation: SIM00USDT."""
        return self.base + self.quote

    @property
    def symbol(self) -> str:
        """Name in ccxt's notation: SIM00/USDT, or SIM00/USDT:USDT for a perpetual."""
        return f"{self.base}/{self.quote}" + f":{self.quote}" * self.perpetual

    @property
    def digits(self) -> tuple[int, int]:
        """Decimals of prices and of volumes: always 8 on spot, as many as needed on futures."""
        return (_decimals(self.tick), _decimals(self.lot)) if self.perpetual else (8, 8)


def _decimals(step: float) -> int:
    return min(8, max(0, round(-log10(step))))


class BarFeed(Protocol):
    """Bars of all instruments, one after another."""

    instruments: list[Instrument]
    timeframe_ms: int

    def begin(self, open_ms: int, history: int) -> None:
        """Start with a bar that opens at ``open_ms``, ``history`` bars before the current one."""

    def step(self) -> Floats:
        """Next bar of each instrument, (instruments, 6); NaN where the venue has none."""


class GeneratedFeed:
    """Generated instruments: SIM00/USDT, SIM01/USDT, …, and perpetuals SIM00/USDT:USDT, …."""

    def __init__(self, spot: int, perpetuals: int, timeframe_ms: int, seed: int) -> None:
        self.timeframe_ms, self._seed = timeframe_ms, seed
        market = Market(spot + perpetuals, timeframe_ms, seed=seed)
        width = max(2, len(str(max(spot, perpetuals) - 1)))
        self.instruments = [
            Instrument(f"SIM{number:0{width}d}", "USDT", perpetual, float(tick), float(lot))
            for (perpetual, number), tick, lot in zip(
                [(False, n) for n in range(spot)] + [(True, n) for n in range(perpetuals)],
                market.tick,
                market.lot,
                strict=True,
            )
        ]
        self._market = market

    def begin(self, open_ms: int, history: int) -> None:  # noqa: ARG002  # generated bars never end
        self._market = Market(
            len(self.instruments), self.timeframe_ms, seed=self._seed, start_ms=open_ms
        )

    def step(self) -> Floats:
        return self._market.step()


class FileFeed:
    """Candles of files, replayed at the present time and repeated; gaps remain gaps.

    Each file is one spot market, named after it: ``BTCUSDT-5m.csv`` is BTC/USDT. All must have
    the same timeframe. The first bars of a file are history.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        tables = [read_candles(path) for path in paths]
        lengths = {table.timeframe.milliseconds for table in tables}
        step = lengths.pop() if lengths else None
        if lengths or step is None:
            raise CandleFileError("the files must have the same timeframe, shorter than a month")
        self.timeframe_ms = step
        self._rows = [_align_to_grid(table, step) for table in tables]
        self.instruments = [
            _instrument(table, rows) for table, rows in zip(tables, self._rows, strict=True)
        ]
        names = [instrument.name for instrument in self.instruments]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise CandleFileError(f"two files have the symbol {twice}")
        self._at = [0] * len(tables)

    def begin(self, open_ms: int, history: int) -> None:  # noqa: ARG002  # times do not matter
        # At most half of a file is history, so that bars are left to replay.
        self._at = [(min(history, len(rows) // 2) - history) % len(rows) for rows in self._rows]

    def step(self) -> Floats:
        bars = np.stack([rows[at] for rows, at in zip(self._rows, self._at, strict=True)])
        self._at = [(at + 1) % len(rows) for rows, at in zip(self._rows, self._at, strict=True)]
        return bars


def _align_to_grid(table: CandleTable, step: int) -> Floats:
    index = (table.times - table.times[0]) // step
    rows = np.full((int(index[-1]) + 1, 6), np.nan)
    rows[index] = table.values
    return rows


def _instrument(table: CandleTable, rows: Floats) -> Instrument:
    name = re.sub(r"[^A-Z0-9]", "", re.split(r"[-_. ]", table.path.name)[0].upper()) or "FILE"
    quote = next((q for q in _QUOTES if name.endswith(q) and name != q), "")
    return Instrument(
        name.removesuffix(quote),
        quote or "USDT",
        perpetual=False,
        tick=_step(rows[:, :4]),
        lot=_step(rows[:, 4]),
    )


def _step(numbers: Floats) -> float:
    """Largest power of ten, at least 1e-8, of which the first numbers are multiples."""
    known = numbers[np.isfinite(numbers)][:2_000]
    for digits in range(8):
        if np.allclose(known, np.round(known, digits), rtol=0, atol=1e-9):
            return float(10.0**-digits)
    return 1e-8
