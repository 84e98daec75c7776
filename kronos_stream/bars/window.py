"""Context windows: the bars that one forecast starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kronos_stream.bars.scaling import price_scale, scale_prices
from kronos_stream.channels import AMOUNT, CLIP, STD_FLOOR, VOLUME
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.series import Series

REAL, SYNTHETIC, MISSING = 0, 1, 2
"""Kinds of bars: traded, without trades, not received from the venue so far."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Input of one forecast."""

    series: Series
    values: NDArray[np.float32]
    """(L, 6) open, high, low, close, volume, amount; (L, 5) if any bar lacks its amount."""
    times: NDArray[np.int64]
    """(L,) opens, UTC ms."""
    synthetic: int
    """Number of synthetic and missing bars."""
    revision: int
    """Revision of the last bar."""
    last: Candle
    """The origin bar, in full precision."""
    reasons: tuple[str, ...] = ()
    """Reasons why the forecast is degraded; empty if it is not."""


def build_window(series: Series, bars: Sequence[Bar]) -> Window:
    """Build the window of ``bars``, oldest first, at least one."""
    return window_of_rows(
        series,
        np.array([bar_values(bar) for bar in bars]),
        np.array([bar.candle.time for bar in bars]),
        np.array([bar_kind(bar) for bar in bars], np.uint8),
        bars[-1].revision,
    )


def window_of_rows(
    series: Series,
    values: NDArray[np.float64],
    times: NDArray[np.int64],
    kinds: NDArray[np.uint8],
    revision: int,
) -> Window:
    """Build a window of (L, 6) values, NaN where an amount is unknown; all arrays are copied."""
    opened, high, low, close, volume, amount = values[-1].tolist()
    amount = amount if amount >= 0 else None
    columns = AMOUNT if np.isnan(values[:, AMOUNT]).any() else AMOUNT + 1
    narrow = np.ascontiguousarray(values[:, :columns], np.float32)
    return Window(
        series,
        narrow,
        times.copy(),
        int(np.count_nonzero(kinds)),
        revision,
        Candle(int(times[-1]), opened, high, low, close, volume, amount),
        (*_kind_reasons(kinds), *(["last bar clipped"] if _clipped(narrow) else [])),
    )


def bar_values(bar: Bar) -> tuple[float, ...]:
    """Columns of a bar in double precision; NaN for an unknown amount."""
    _, *prices_and_volume, amount = bar.candle
    return (*prices_and_volume, np.nan if amount is None else amount)


def bar_kind(bar: Bar) -> int:
    """Return REAL, SYNTHETIC or MISSING."""
    return REAL if not bar.synthetic else SYNTHETIC if bar.received else MISSING


def _kind_reasons(kinds: NDArray[np.uint8]) -> list[str]:
    counts = {
        "synthetic": int(np.count_nonzero(kinds == SYNTHETIC)),
        "missing": int(np.count_nonzero(kinds == MISSING)),
    }
    return [
        f"{count} {kind} bar{'s' if count > 1 else ''}" for kind, count in counts.items() if count
    ]


def _clipped(values: NDArray[np.float32]) -> bool:
    """Return whether normalisation clips the last bar in any channel."""
    scaled = scale_prices(values, price_scale(values)).astype(np.float64)
    if scaled.shape[1] == AMOUNT:
        derived = scaled[:, VOLUME] * scaled[:, :VOLUME].mean(axis=1)
        scaled = np.column_stack((scaled, derived))
    distance = np.abs(scaled[-1] - scaled.mean(axis=0))
    return bool((distance > CLIP * (scaled.std(axis=0) + STD_FLOOR)).any())
