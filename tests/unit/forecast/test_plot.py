"""Ticks on the time axis of a plot."""

from __future__ import annotations

import re

import numpy as np
import pytest

from kronos_stream.forecast.plot import time_ticks
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.utc import parse_time


@pytest.mark.parametrize("text", ["1s", "5m", "1h", "1d", "1w", "1M"])
def test_ticks_are_few_and_name_the_date(text: str) -> None:
    timeframe = Timeframe.parse(text)
    start = parse_time("2024-02-27T22:30")
    ticks, labels = time_ticks(np.array([timeframe.after(start, k) for k in range(124)]))
    assert 2 <= len(ticks) == len(labels) <= 9
    assert re.search(r"\b20\d\d$", labels[0])
