"""Scaling of prices that move less than the model can resolve."""

from __future__ import annotations

import numpy as np

from kronos_stream.bars.scaling import price_scale, scale_prices
from tests.support.windows import random_window


def test_price_scale_is_a_power_of_two_that_gives_a_deviation_above_one() -> None:
    ordinary = random_window(1).values
    assert price_scale(ordinary) == 1
    for exponent in (20, 30, 60):
        small = scale_prices(ordinary, 2.0**-exponent)
        scale = price_scale(small)
        assert np.log2(scale) % 1 == 0
        assert 1 <= (small[:, 3] * np.float64(scale)).std() < 2


def test_price_scale_of_a_flat_series_makes_the_models_constant_negligible() -> None:
    flat = np.full((50, 6), 1e-8, np.float32)
    assert 1e-9 / price_scale(flat) < 1e-15
    assert price_scale(np.full((50, 6), 5e4, np.float32)) == 1
    assert price_scale(np.zeros((50, 5), np.float32)) == 1


def test_price_scale_keeps_the_turnover_within_float32() -> None:
    values = scale_prices(random_window(1).values, 2.0**-60)
    values[:, 5] = 1e12
    assert 1 <= price_scale(values) * 1e12 < 1e17
