"""What ``kronos-stream forecast`` was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kronos_stream.market.timeframe import Timeframe


@dataclass(frozen=True, slots=True)
class ForecastArguments:
    """What was asked for, checked as far as it can be without reading anything."""

    file: Path
    model: str
    tokenizer: str | None
    revision: str | None
    horizon: int
    paths: int
    lookback: int
    max_context: int | None
    temperature: float
    top_k: int
    top_p: float
    seed: int
    anchor: bool
    timeframe: Timeframe | None
    series: str | None
    at: int | None
    device: str
    dtype: str
    quantiles: tuple[float, ...]
    plot: Path | None
    out: Path | None
    as_json: bool
