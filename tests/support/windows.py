"""Random context windows."""

from __future__ import annotations

import numpy as np

from kronos_stream.bars.window import Window
from kronos_stream.market.candle import Candle
from kronos_stream.market.series import Series

_FIRST = 1_700_000_000_000


def random_window(number: int, bars: int = 96, columns: int = 6, price: float = 100.0) -> Window:
    """Window of one-second bars of series ``test:S<number>/X:1s``; ``number`` is the seed."""
    random = np.random.default_rng(number)
    close = price * np.exp(random.normal(0, 0.01, bars).cumsum())
    opened = np.concatenate((close[:1], close[:-1]))
    volume = random.lognormal(3, 1, bars)
    high, low = np.maximum(opened, close) * 1.002, np.minimum(opened, close) * 0.998
    rows = np.stack((opened, high, low, close, volume, volume * close), axis=1).astype(np.float32)
    times = _FIRST + 1000 * np.arange(bars)
    last = Candle(int(times[-1]), *map(float, rows[-1]))
    series = Series.parse(f"test:S{number}/X:1s")
    return Window(series, rows[:, :columns], times, 0, 0, last, ())
