"""The forecast part of a message: quantile bands of five channels, and a summary.

Numbers are rounded to float32, the precision of the paths, and written with the fewest digits
that identify the float32: 62145.37, not 62145.37109375. This keeps messages small, and the same
paths always give the same digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from kronos_stream.channels import AMOUNT, CHANNELS, CLOSE, HIGH, LOW, OPEN, VOLUME
from kronos_stream.forecast.quantiles import quantile_name, weibull_quantiles
from kronos_stream.forecast.summary import Summary, summarise

PUBLISHED_CHANNELS = CHANNELS[:5]
"""Channels of a candle that have bands in a message: all but the amount."""

PublishedPaths = Literal["none", "close", "ohlcva"]
"""Channels of the sample paths that are published."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """Forecast of one series in price units."""

    times: list[int]
    """Opens of the forecast bars, UTC ms."""
    channels: dict[str, dict[str, list[float]]]
    """By channel: the mean and the quantiles by name (``q05``), one number per bar."""
    summary: Summary
    repaired: int
    """Number of candles, over all steps of all paths, that :func:`repair` changed."""
    paths: list[list[float]] | None = None
    """Closes of every path, if published."""
    other_paths: dict[str, list[list[float]]] | None = None
    """Opens, highs, lows, volumes and amounts of every path, by channel, if published."""


def build_outlook(
    paths: NDArray[np.float32],
    times: Sequence[int] | NDArray[np.int64],
    last: float,
    probs: Sequence[float],
    *,
    publish: PublishedPaths = "none",
) -> Outlook:
    """Reduce ``paths`` (paths, horizon, 6), after :func:`repair`, to bands and a summary.

    times: (horizon,) bar opens, UTC ms. last: close of the origin bar. probs: probabilities of the
    quantiles. Raises ValueError if a path is not finite, or if the paths are too few for ``probs``.
    """
    if not np.isfinite(paths).all():
        raise ValueError("paths hold NaN or infinite values")
    candles, repaired = repair(paths)
    mean = candles.mean(axis=0, dtype=np.float64)
    bands = np.concatenate((mean[None], weibull_quantiles(candles, probs)))
    names = ("mean", *map(quantile_name, probs))
    by_channel = _shortest_floats(bands.transpose(2, 0, 1))
    return Outlook(
        times=[int(time) for time in times],
        channels={
            channel: dict(zip(names, rows, strict=True))
            for channel, rows in zip(PUBLISHED_CHANNELS, by_channel, strict=True)
        },
        summary=summarise(candles, last, probs),
        repaired=repaired,
        paths=None if publish == "none" else _shortest_floats(candles[..., CLOSE]),
        other_paths=_other_paths(candles, paths[..., AMOUNT]) if publish == "ohlcva" else None,
    )


def repair(paths: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
    """Make candles (paths, horizon, 5) consistent; returns them and the number of changed ones.

    The model samples channels independently, so a high may be below the close. High is raised to
    open and close, low is lowered to them, volume is at least 0; open and close do not change.
    """
    drawn = paths[..., : len(PUBLISHED_CHANNELS)]
    candles = drawn.copy()
    body = candles[..., (OPEN, CLOSE)]
    np.maximum(candles[..., HIGH], body.max(axis=-1), out=candles[..., HIGH])
    np.minimum(candles[..., LOW], body.min(axis=-1), out=candles[..., LOW])
    np.maximum(candles[..., VOLUME], 0, out=candles[..., VOLUME])
    return candles, int((candles != drawn).any(axis=-1).sum())


def _other_paths(
    candles: NDArray[np.float32], amounts: NDArray[np.float32]
) -> dict[str, list[list[float]]]:
    """All channels of the paths but the close; amounts, like volumes, are at least 0."""
    others = {
        channel: _shortest_floats(candles[..., column])
        for column, channel in enumerate(PUBLISHED_CHANNELS)
        if column != CLOSE
    }
    return others | {"amount": _shortest_floats(np.maximum(amounts, 0))}


def _shortest_floats(numbers: NDArray[np.floating]) -> Any:  # noqa: ANN401 - lists nested as deep as the array
    """Nested lists of floats, with the fewest digits that identify the float32 of each number."""
    exact = np.ascontiguousarray(numbers, np.float32)
    return orjson.loads(orjson.dumps(exact, option=orjson.OPT_SERIALIZE_NUMPY))
