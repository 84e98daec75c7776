"""Windows of generated markets: an endless training set without repetition."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kronos_stream.market.timeframe import Timeframe
from kronos_stream.testing.market import START_MS, Candles, Market
from kronos_stream.testing.seasonality import WEEK_MS
from kronos_stream.training.windows import Windows, step_rng

HELD_OUT_SEED = 500_000
"""Index of the first held-out market; markets from here on are not used for training."""

_SYMBOLS, _BARS = 64, 1024
_STEPS_PER_MARKET = 48
"""Steps after which the oldest market of the pool is replaced by a new one."""


class GeneratedWindows:
    """Windows from a pool of markets, at least one per timeframe, replaced one by one."""

    def __init__(
        self, timeframes: tuple[str, ...], window: int, seed: int, *, held_out: bool = False
    ) -> None:
        self._steps_ms = []
        for text in timeframes:
            length = Timeframe.parse(text).milliseconds
            if length is None:
                raise ValueError(f"{text}: generated markets need a timeframe of fixed length")
            self._steps_ms.append(length)
        self._window, self._seed, self._held_out = window, seed, held_out
        self._pool = max(len(timeframes), 6)
        self._market = lru_cache(self._pool)(self._generate)

    def draw(self, step: int, batch: int, rows: npt.NDArray[np.int64]) -> Windows:
        """Return the given rows of the batch of ``step``; neighbours are from different markets."""
        rng = step_rng(self._seed, step, 2)
        newest = self._pool + step // _STEPS_PER_MARKET
        market = newest - (rng.integers(self._pool) + np.arange(batch)) % self._pool
        symbol = rng.integers(_SYMBOLS, size=batch)
        start = rng.integers(_BARS - self._window + 1, size=batch)
        values = np.empty((len(rows), self._window, 6))
        times = np.empty((len(rows), self._window), dtype=np.int64)
        for i, row in enumerate(rows):
            candles = self._market(int(market[row]))
            bars = slice(int(start[row]), int(start[row]) + self._window)
            values[i] = candles.values[bars, symbol[row]]
            times[i] = candles.times[bars]
        return Windows(values, times)

    def _generate(self, index: int) -> Candles:
        seed = self._seed * 1_000_000 + (HELD_OUT_SEED if self._held_out else 0) + index
        weeks = int(np.random.default_rng([seed, 7]).integers(300))
        length = self._steps_ms[index % len(self._steps_ms)]
        return Market(_SYMBOLS, length, seed=seed, start_ms=START_MS + weeks * WEEK_MS).run(_BARS)
