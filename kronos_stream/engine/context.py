"""Contexts: the candles a forecast starts from, validated and normalised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kronos_stream.channels import CHANNELS, CLOSE
from kronos_stream.market.spacing import common_step, infer_timeframe
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.utc import rfc3339
from kronos_stream.model.inputs import (
    Floats,
    Ints,
    fill_missing_channels,
    normalise,
    time_stamps,
)

MIN_BARS = 2
_YEARS_MS = (-62_135_596_800_000, 253_402_300_800_000)  # 1 to 9999


class ContextError(ValueError):
    """Invalid context; the message names the series and the bar."""


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """The closed bars of one series up to the forecast's origin, oldest first.

    values: (L, 6) open, high, low, close, volume, amount in price and volume units; (L, 5) has no
        amount (derived as volume x mean of open, high, low, close), (L, 4) has no volume either
        (both are 0). The model's normalisation adds 1e-5 to the standard deviation, so prices
        that move by less than about 1e-3 must be scaled up.
    times: (L,) bar opens, integer ms UTC, strictly increasing.
    series: name of the series, part of the noise key; by default the context's index in the call.
    timeframe: for example "5m"; by default the most common step of ``times``.
    future_times: (>= horizon,) opens of the bars to forecast, for markets with sessions or
        holidays; by default the horizon continues by the timeframe.
    timezone: IANA name of the zone whose local time the model receives; UTC by default.
    """

    values: ArrayLike
    times: ArrayLike
    series: str | None = None
    timeframe: str | None = None
    future_times: ArrayLike | None = None
    timezone: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PreparedContext:
    """A validated context in the model's units, for one horizon."""

    name: str
    normalised: Floats  # (L, 6)
    mean: Floats  # (6,)
    std: Floats  # (6,)
    stamps: Ints  # (L + horizon, 5)
    future_times: Ints  # (horizon,)
    origin: int
    last_close: float

    @property
    def length(self) -> int:
        return len(self.normalised)

    @property
    def horizon(self) -> int:
        return len(self.future_times)


def prepare_all(contexts: Sequence[Context], horizons: Sequence[int]) -> list[PreparedContext]:
    """Validate and normalise a call's contexts. Raises ContextError."""
    stamps: dict[tuple[bytes, str | None], Ints] = {}
    pairs = zip(contexts, horizons, strict=True)
    return [prepare(context, i, horizon, stamps) for i, (context, horizon) in enumerate(pairs)]


def context_name(context: Context, index: int) -> str:
    """Name of a context in error messages."""
    return f"context {index}" if context.series is None else repr(context.series)[1:-1]


def prepare(
    context: Context,
    index: int,
    horizon: int,
    known_stamps: dict[tuple[bytes, str | None], Ints] | None = None,
) -> PreparedContext:
    """Validate and normalise ``context``. Raises ContextError.

    known_stamps: cache of time stamps, since most series of a call share their times; extended.
    """
    name = context_name(context, index)
    for what in ("series", "timeframe", "timezone"):
        _check_text(getattr(context, what), what, name)
    times = _times(context.times, name)
    values = _candles(context.values, times, name)
    future = _future_times(context, times, horizon, name)
    mean, std, normalised = _normalise_checked(values, name)
    all_times = np.concatenate((times, future))
    key = all_times.tobytes(), context.timezone
    known = {} if known_stamps is None else known_stamps
    if key not in known:
        known[key] = time_stamps(all_times + utc_offsets(all_times, context.timezone, name))
    return PreparedContext(
        name=str(index) if context.series is None else context.series,
        normalised=normalised,
        mean=mean,
        std=std,
        stamps=known[key],
        future_times=future,
        origin=int(times[-1]),
        last_close=float(values[-1, CLOSE]),
    )


def _normalise_checked(values: Floats, name: str) -> tuple[Floats, Floats, Floats]:
    """Call :func:`normalise`; reject values whose squares overflow float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std, normalised = normalise(values)
    bad = np.flatnonzero(~np.isfinite(std))
    if len(bad):
        column = values[:, bad[0]]
        raise ContextError(
            f"{name}: {CHANNELS[bad[0]]} is too large to normalise in float32 (up to "
            f"{np.abs(column).max():g} at bar {np.abs(column).argmax()}); use a larger unit"
        )
    return mean, std, normalised


def utc_offsets(times: Ints, timezone: str | None, name: str = "context") -> Ints:
    """Offsets (L,) in ms from UTC to the local time of an IANA zone; None means UTC."""
    if timezone is None or timezone == "UTC":
        return np.zeros_like(times)
    try:
        zone = ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ContextError(f"{name}: unknown time zone {timezone!r}; use an IANA name") from None
    offsets = (datetime.fromtimestamp(t / 1000, zone).utcoffset() for t in times.tolist())
    return np.array([0 if o is None else int(o.total_seconds() * 1000) for o in offsets])


def _times(raw: ArrayLike, name: str) -> Ints:
    times = np.asarray(raw)
    if np.issubdtype(times.dtype, np.datetime64):
        times = times.astype("datetime64[ms]")
    if times.ndim != 1 or len(times) < MIN_BARS:
        raise ContextError(
            f"{name}: at least {MIN_BARS} bars are needed, times has shape {times.shape}"
        )
    times = _whole_ms(times, "times", name)
    bad = np.flatnonzero(np.diff(times) <= 0)
    if len(bad):
        i = int(bad[0]) + 1
        raise ContextError(
            f"{name}: times must strictly increase; bar {i} ({_format_time(times[i])}) "
            f"does not follow bar {i - 1} ({_format_time(times[i - 1])})"
        )
    return times


def _whole_ms(times: NDArray[Any], what: str, name: str) -> Ints:
    if times.dtype.kind not in "iuM":
        raise ContextError(f"{name}: {what} must be integer ms UTC, not {times.dtype}")
    times = times.astype(np.int64)
    bad = np.flatnonzero((times < _YEARS_MS[0]) | (times >= _YEARS_MS[1]))
    if len(bad):
        raise ContextError(
            f"{name}: {what} must be ms since 1970, not us or ns; entry {bad[0]} is "
            f"{times[bad[0]]}, outside the years 1 to 9999"
        )
    return times


def _candles(raw: ArrayLike, times: Ints, name: str) -> Floats:
    values = np.asarray(raw)
    if values.ndim != 2 or values.shape[1] not in (4, 5, 6) or len(values) != len(times):
        raise ContextError(
            f"{name}: values must be ({len(times)}, 6) like times, with columns "
            f"{', '.join(CHANNELS)}; got shape {values.shape}"
        )
    if values.dtype.kind not in "fiu":
        raise ContextError(f"{name}: values must be numbers, not {values.dtype}")
    # Overflow to infinity is reported below, with the bar.
    with np.errstate(over="ignore"):
        # In C order: the rounding of sums over bars depends on the memory order.
        values = values.astype(np.float32, order="C")
    given = values.shape[1]
    values = fill_missing_channels(values)
    row, column = _first_index(~np.isfinite(values))
    if row is not None:
        raise ContextError(
            f"{name}: {CHANNELS[column]} of bar {row} ({_format_time(times[row])}) is "
            f"{values[row, column]}; every value must be a finite float32"
        )
    row, _ = _first_index(values[:, 1:2] < values[:, 2:3])
    if row is not None:
        raise ContextError(
            f"{name}: impossible candle at bar {row} ({_format_time(times[row])}): "
            f"high {values[row, 1]:g} is below low {values[row, 2]:g}"
        )
    row, column = _first_index(values[:, 4:given] < 0)
    if row is not None:
        raise ContextError(
            f"{name}: impossible candle at bar {row} ({_format_time(times[row])}): "
            f"{CHANNELS[4 + column]} {values[row, 4 + column]:g} is negative"
        )
    return values


def _future_times(context: Context, times: Ints, horizon: int, name: str) -> Ints:
    if context.future_times is not None:
        future = np.asarray(context.future_times)
        if np.issubdtype(future.dtype, np.datetime64):
            future = future.astype("datetime64[ms]")
        if future.ndim != 1 or len(future) < horizon:
            raise ContextError(
                f"{name}: future_times has shape {future.shape}, the horizon is {horizon} bars"
            )
        future = _whole_ms(future[:horizon], "future_times", name)
        bad = np.flatnonzero(np.diff(future, prepend=times[-1]) <= 0)
        if len(bad):
            raise ContextError(
                f"{name}: future_times must strictly increase after the last bar "
                f"({_format_time(times[-1])}); entry {bad[0]} is {_format_time(future[bad[0]])}"
            )
        return future
    origin = int(times[-1])
    try:
        if context.timeframe is None:
            timeframe = infer_timeframe(times)
        else:
            timeframe = Timeframe.parse(context.timeframe)
    except ValueError as error:
        raise ContextError(f"{name}: {error}") from None
    # Compare the most common step: a clock change may shorten a day.
    if common_step(times) < timeframe.min_milliseconds:
        raise ContextError(
            f"{name}: bars mostly open {common_step(times)} ms apart, closer than the timeframe "
            f"{timeframe}; times must be ms UTC"
        )
    step = timeframe.milliseconds
    if step is not None:
        return origin + step * np.arange(1, horizon + 1, dtype=np.int64)
    return np.array([timeframe.after(origin, bars) for bars in range(1, horizon + 1)], np.int64)


def _check_text(text: object, what: str, name: str) -> None:
    if text is None:
        return
    if not isinstance(text, str):
        raise ContextError(f"{name}: {what} must be text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ContextError(f"{name}: {what} {text!r} cannot be encoded as UTF-8") from None


def _first_index(bad: NDArray[np.bool_]) -> tuple[int, int] | tuple[None, int]:
    if not bad.any():
        return None, 0
    row, column = np.argwhere(bad)[0]
    return int(row), int(column)


def _format_time(ms: np.int64) -> str:
    return rfc3339(int(ms))
