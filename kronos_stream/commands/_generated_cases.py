"""Walk-forward cases from generated markets that no model was trained on, with their truth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kronos_stream.evaluation.cases import Case, History
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.testing.market import START_MS, Market
from kronos_stream.testing.seasonality import WEEK_MS

EVALUATION_SEED_BASE = 900_000_000
"""Seeds from here on are reserved for evaluation; training uses lower ones."""

_SYMBOLS = 8
_ORIGINS = 6
_MAX_LOOKBACK = 232
_MIN_LOOKBACK = 96


def generated_cases(
    timeframes: Sequence[str], *, count: int, horizon: int, seed: int = 0, truth_paths: int = 0
) -> Iterator[Case]:
    """Yield at least ``count`` cases, from one market after the other, timeframes in turn.

    Each market has several symbols and origins; each origin has a random lookback of 96 to 232
    bars. All symbols of an origin form one block. ``truth_paths`` is the number of futures to
    simulate from the market's own state.
    """
    made = index = 0
    while made < count:
        text = timeframes[index % len(timeframes)]
        length = Timeframe.parse(text).milliseconds
        if length is None:
            raise ValueError(f"{text}: generated markets have bars of fixed length")
        rng = np.random.default_rng([EVALUATION_SEED_BASE, seed, index])
        start_ms = START_MS + int(rng.integers(300)) * WEEK_MS
        market = Market(
            _SYMBOLS, length, seed=EVALUATION_SEED_BASE + seed * 10_000 + index, start_ms=start_ms
        )
        for origin in range(_ORIGINS):
            lookback = int(rng.integers(_MIN_LOOKBACK, _MAX_LOOKBACK + 1))
            past = market.run(_MAX_LOOKBACK + int(rng.integers(100)))
            truth = [
                market.fork(seed=int(rng.integers(2**31))).run(horizon).values
                for _ in range(truth_paths)
            ]
            future = market.run(horizon).values
            for symbol in range(_SYMBOLS):
                history = History(
                    f"generated:M{index}S{symbol}/USD:{text}",
                    text,
                    past.values[-lookback:, symbol],
                    past.times[-lookback:],
                )
                paths = np.stack([t[:, symbol] for t in truth]) if truth else None
                yield Case(history, future[:, symbol], index * _ORIGINS + origin, paths)
                made += 1
        index += 1
