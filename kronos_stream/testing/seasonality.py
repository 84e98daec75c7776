"""Weekly pattern of activity in a market that never closes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

WEEK_MS = 7 * 86_400_000
_EPOCH_TO_MONDAY_MINUTES = 3 * 1440
"""1970-01-01 was a Thursday: a week counted from the epoch starts there."""

_SESSIONS = ((0.5, 1.2, 0.30), (8.0, 1.8, 0.40), (14.5, 2.2, 0.75), (20.0, 1.0, 0.15))
"""Hour UTC, width in hours and height, in log volatility, of Asia's, Europe's, America's open
and the futures' settlement: the peaks in volume and volatility of 24-hour markets."""


def weekly_activity(timeframe_ms: int) -> npt.NDArray[np.float64]:
    """Log volatility multiplier of each bar of a week from the epoch's weekday on.

    Its mean over the week is 0 in variance, so the pattern changes no long-run volatility.
    """
    minutes = np.arange(7 * 1440)
    hour = minutes % 1440 / 60
    weekday = (minutes + _EPOCH_TO_MONDAY_MINUTES) // 1440 % 7
    log_vol = np.zeros(len(minutes))
    for centre, width, height in _SESSIONS:
        distance = (hour - centre + 12) % 24 - 12  # around the clock
        log_vol += height * np.exp(-0.5 * (distance / width) ** 2)
    log_vol -= np.where(weekday >= 5, 0.35, 0.0)  # Saturday and Sunday
    log_vol += np.where(minutes % 60 == 0, 0.25, np.where(minutes % 15 == 0, 0.10, 0.0))
    variance = np.exp(2 * log_vol)
    variance /= variance.mean()
    if timeframe_ms <= 60_000:  # a minute is the table's resolution
        return np.repeat(np.asarray(0.5 * np.log(variance)), 60_000 // timeframe_ms)
    per_bar = timeframe_ms // 60_000
    bars = len(minutes) // per_bar
    means = variance[: bars * per_bar].reshape(bars, per_bar).mean(1)
    return np.asarray(0.5 * np.log(means), np.float64)
