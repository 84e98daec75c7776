"""What a message says of the bars ahead: bands of five channels, and a summary.

Numbers are those of float32, the precision of the paths, and are written with the fewest digits
that name them: 62145.37, not 62145.37109375. So messages are small, and who draws the same paths
again finds the same digits.
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
"""What of the paths themselves is published."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """One series' forecast in plain numbers, price units."""

    times: list[int]
    """Opens of the bars ahead, UTC ms."""
    channels: dict[str, dict[str, list[float]]]
    """By channel: the mean and the quantiles by name (``q05``), one number per bar ahead."""
    summary: Summary
    repaired: int
    """How many candles, of all steps of all paths, had to be made possible."""
    paths: list[list[float]] | None = None
    """Closes of every path, if asked for."""
    other_paths: dict[str, list[list[float]]] | None = None
    """Likewise opens, highs, lows, volumes and amounts, by channel."""


def build_outlook(
    paths: NDArray[np.float32],
    times: Sequence[int] | NDArray[np.int64],
    last: float,
    probs: Sequence[float],
    *,
    publish: PublishedPaths = "none",
) -> Outlook:
    """What ``paths`` (paths, horizon, 6) say, after :func:`repair`.

    times: (horizon,) bar opens, UTC ms. last: close of the origin bar. probs: of the quantiles.
    Raises ValueError where the paths are not all finite, or too few for ``probs``.
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
    """Candles (paths, horizon, 5) that can be, and how many of them were changed for it.

    The model draws channels side by side: a high may come out below the close. High becomes at
    least open and close, low at most, volume at least 0; open and close stay as drawn.
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
    """What there is of the paths beside the closes; an amount, like a volume, is at least 0."""
    others = {
        channel: _shortest_floats(candles[..., column])
        for column, channel in enumerate(PUBLISHED_CHANNELS)
        if column != CLOSE
    }
    return others | {"amount": _shortest_floats(np.maximum(amounts, 0))}


def _shortest_floats(numbers: NDArray[np.floating]) -> Any:  # noqa: ANN401 - lists as deep as the array
    """Nested lists of the nearest float32 of each, as the float of fewest digits that names it."""
    exact = np.ascontiguousarray(numbers, np.float32)
    return orjson.loads(orjson.dumps(exact, option=orjson.OPT_SERIALIZE_NUMPY))
