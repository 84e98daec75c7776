"""Model inputs: normalisation of candles, its inverse, and time stamps. Uses numpy only.

Operations and their order are those of the reference: rounding here can change a token.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kronos_stream.channels import CLIP, STD_FLOOR

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
_Numbers = TypeVar("_Numbers", NDArray[np.float32], NDArray[np.float64])

_MINUTE_MS = 60_000
_DAY_MS = 86_400_000


def fill_missing_channels(values: _Numbers) -> _Numbers:
    """Fill missing volume and amount columns: (L, 4 | 5 | 6) to (L, 6)."""
    if values.shape[1] == 4:
        return np.pad(values, ((0, 0), (0, 2)))
    if values.shape[1] == 5:
        amount = values[:, 4:] * values[:, :4].mean(axis=1, keepdims=True)
        return np.concatenate((values, amount), axis=1)
    return values


def normalise(values: Floats, clip: float = CLIP) -> tuple[Floats, Floats, Floats]:
    """Return mean (6,), std (6,) and clipped z-scores (L, 6) over the whole window, in float32."""
    mean: Floats = np.mean(values, axis=0)
    std: Floats = np.std(values, axis=0)
    return mean, std, np.clip((values - mean) / (std + STD_FLOOR), -clip, clip).astype(np.float32)


def denormalise(values: Floats, mean: Floats, std: Floats) -> Floats:
    """Undo :func:`normalise` on (..., 6)."""
    return values * (std + np.float32(STD_FLOOR)) + mean


def time_stamps(times: Ints) -> Ints:
    """Minute, hour, weekday (Monday 0), day of month and month of ms since 1970: (...) to (..., 5).

    Of UTC, or of a time zone if its offset has been added.
    """
    days = times // _DAY_MS
    minutes = times % _DAY_MS // _MINUTE_MS
    date = days.astype("datetime64[D]")
    month = date.astype("datetime64[M]")
    return np.stack(
        (
            minutes % 60,
            minutes // 60,
            (days + 3) % 7,  # 1970-01-01 was a Thursday
            (date - month).astype(np.int64) + 1,
            month.astype(np.int64) % 12 + 1,
        ),
        axis=-1,
    )
