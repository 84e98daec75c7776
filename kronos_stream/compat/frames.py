"""Conversion of the reference's DataFrames and time stamps to the model's units."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kronos_stream.channels import CHANNELS, CLOSE, PRICES
from kronos_stream.engine.context import PreparedContext
from kronos_stream.model.inputs import fill_missing_channels, normalise, time_stamps


def prepare_frame(
    index: int,
    df: pd.DataFrame,
    x_timestamp: Any,
    y_timestamp: Any,
    pred_len: int,
    clip: float,
) -> PreparedContext:
    """Prepare one series' history and future times, normalised as in the reference.

    index: position of the series in the call, used in errors and in the noise key.
    df: (L, >= 4), see :func:`candles`. x_timestamp: (L,), y_timestamp: (pred_len,), see
        :func:`wall_clock`. clip: bound of the normalised values, in standard deviations.

    Raises ValueError for missing columns, rows or values, and for a number of times that differs
    from the number of bars.
    """
    values = candles(df)
    if not len(values):
        raise ValueError(f"series {index}: the DataFrame has no rows")
    if len(x_timestamp) != len(df) or len(y_timestamp) != pred_len:
        raise ValueError(
            f"series {index}: {len(df)} rows need as many x_timestamp (not {len(x_timestamp)}) "
            f"and pred_len {pred_len} as many y_timestamp (not {len(y_timestamp)})"
        )
    mean, std, normalised = normalise(values, clip)
    past, future = wall_clock(x_timestamp), wall_clock(y_timestamp)
    return PreparedContext(
        name=str(index),
        normalised=normalised,
        mean=mean,
        std=std,
        stamps=time_stamps(np.concatenate((past, future))),
        future_times=future,
        origin=int(past[-1]),
        last_close=float(values[-1, CLOSE]),
    )


def candles(df: pd.DataFrame) -> NDArray[np.float32]:
    """Read the six channels (L, 6); fill missing volume and amount as in the reference.

    Without amount: volume x mean of open, high, low, close. Without volume: both are 0.
    Raises ValueError for anything but a DataFrame, for missing prices and for NaN.
    """
    if not isinstance(df, pd.DataFrame):
        raise ValueError("Input must be a pandas DataFrame.")  # noqa: TRY004 - as the reference
    missing = [name for name in CHANNELS[PRICES] if name not in df.columns]
    if missing:
        raise ValueError(f"price columns {missing} not found in the DataFrame")
    columns = list(CHANNELS[PRICES])
    if "volume" in df.columns:
        columns = list(CHANNELS if "amount" in df.columns else CHANNELS[:5])
    values = df[columns].to_numpy(np.float64)
    if np.isnan(values).any():
        raise ValueError("the DataFrame contains NaN values in price or volume columns")
    # In column order, as pandas stores it: the rounding of the reference's sums depends on it.
    return fill_missing_channels(values).astype(np.float32, order="F")


def wall_clock(timestamps: Any) -> NDArray[np.int64]:
    """Convert times (L,) to ms of the local wall clock, which the reference uses for its stamps.

    timestamps: any argument of ``pd.DatetimeIndex``, whose errors are raised; a zone is dropped.
    """
    times = pd.DatetimeIndex(timestamps)
    if times.tz is not None:
        times = times.tz_localize(None)
    return times.to_numpy().astype("datetime64[ms]").astype(np.int64)
