"""Number format of the text table."""

from __future__ import annotations

import pytest

from kronos_stream.forecast.table import price_decimals


@pytest.mark.parametrize(
    ("price", "decimals"), [(0, 2), (64_213.5, 1), (0.1044, 6), (1.2, 5), (1e7, 0), (-37.6, 4)]
)
def test_prices_have_six_significant_digits(price: float, decimals: int) -> None:
    assert price_decimals(price) == decimals
