"""Access to the fixtures made with the reference implementation."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

Cases = dict[str, NDArray[Any]]
Series = tuple[pd.DataFrame, "pd.Series[pd.Timestamp]", "pd.Series[pd.Timestamp]"]

COLUMNS = ["open", "high", "low", "close", "volume", "amount"]
CASES = ["within", "exact_fill", "short", "rollover", "long_history"]
RELATIVE = 1e-4
FORWARD = 1e-4


def greedy_case(expected: dict[str, Any], name: str) -> tuple[int, int]:
    """Bars of history and horizon of a greedy case."""
    (case,) = (c for c in expected["cases"] if c["name"] == name)
    return case["lookback"], case["horizon"]


def series(cases: Cases, i: int, bars: int, horizon: int) -> Series:
    """Series i as a user has it: history, its times, and the future times."""
    times = pd.Series(pd.to_datetime(cases[f"time_{i}"], unit="s"))
    frame = pd.DataFrame(cases[f"ohlcva_{i}"][:bars], columns=COLUMNS)
    return frame, times[:bars], times[bars : bars + horizon]


def tensors(cases: Cases, *names: str) -> list[Tensor]:
    """Copies of the named arrays."""
    return [torch.from_numpy(cases[name].copy()) for name in names]
