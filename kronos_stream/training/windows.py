"""Training batches: normalised candles, time stamps and loss weights of raw windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kronos_stream.channels import CLIP, STD_FLOOR
from kronos_stream.model.inputs import time_stamps


@dataclass(frozen=True, slots=True)
class Windows:
    """Raw windows: ``values`` (B, S, 6) in price units, ``times`` (B, S) opens in UTC ms."""

    values: npt.NDArray[np.float64]
    times: npt.NDArray[np.int64]


class WindowSource(Protocol):
    """Source of windows, which depend only on the seed and the step."""

    def draw(self, step: int, batch: int, rows: npt.NDArray[np.int64]) -> Windows:
        """Return the given rows of the ``batch`` windows of ``step``."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch on its device.

    ``x`` (B, S, 6) normalised candles, ``stamps`` (B, S, 5) int64, ``weights`` (B, S) that
    sum to 1 in every row, so that a mean over rows does not depend on the micro-batches.
    """

    x: Tensor
    stamps: Tensor
    weights: Tensor
    origins: Tensor
    """(B,) lengths of the lookbacks, whose statistics normalise the rows."""


def normalise(
    values: npt.NDArray[np.float64], lookback: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Scale windows (B, S, 6) by mean and deviation of their first ``lookback`` (B,) bars.

    Bars after the lookback are scaled by the same statistics: those of the whole window would
    contain information about the future.
    """
    known = (np.arange(values.shape[1]) < lookback[:, None])[..., None]
    count = lookback[:, None, None]
    mean = np.where(known, values, 0.0).sum(1, keepdims=True) / count
    variance = (np.where(known, values - mean, 0.0) ** 2).sum(1, keepdims=True) / count
    scaled = (values - mean) / (np.sqrt(variance) + STD_FLOOR)
    return np.asarray(np.clip(scaled, -CLIP, CLIP), np.float32)


def make_batch(
    windows: Windows,
    lookback: npt.NDArray[np.int64],
    lookback_weight: float,
    device: torch.device | str = "cpu",
) -> Batch:
    """Make a batch of ``windows`` whose origins follow ``lookback`` (B,) bars."""
    after = np.arange(windows.values.shape[1]) >= lookback[:, None]
    weights = np.where(after, 1.0, lookback_weight)
    weights /= weights.sum(1, keepdims=True)
    return Batch(
        torch.from_numpy(normalise(windows.values, lookback)).to(device),
        torch.from_numpy(time_stamps(windows.times)).to(device),
        torch.from_numpy(weights.astype(np.float32)).to(device),
        torch.from_numpy(lookback).to(device),
    )


def step_rng(seed: int, step: int, purpose: int) -> np.random.Generator:
    """Random generator of one step; depends only on the arguments, so resuming needs no state."""
    return np.random.default_rng([seed, step, purpose])


def draw_lookbacks(
    seed: int, step: int, batch: int, shortest: int, longest: int
) -> npt.NDArray[np.int64]:
    """Draw the lookbacks of the whole batch of ``step``; both bounds are inclusive."""
    return step_rng(seed, step, 1).integers(shortest, longest + 1, batch)
