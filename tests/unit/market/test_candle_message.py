"""Messages of the candle topics."""

from __future__ import annotations

import pytest

from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.candle_message import RelayedBar, decode_bar, encode_bar
from kronos_stream.market.series import Series

SERIES = Series.parse("binance:BTC/USDT:1m")


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize(
    "bar",
    [
        Bar(Candle(60_000, 1.0, 2.0, 0.5, 1.5, 3.0, 4.0), 0, received=120_017),
        Bar(Candle(60_000, 1.0, 2.0, 0.5, 1.5, 3.0, None), 3, received=120_017),
        Bar(Candle(60_000, 1.5, 1.5, 1.5, 1.5, 0.0, 0.0), 0, synthetic=True, received=120_017),
        Bar(Candle(60_000, 1.5, 1.5, 1.5, 1.5, 0.0, 0.0), 0, synthetic=True),
    ],
)
def test_decoding_returns_the_encoded_bar(bar: Bar, history: bool) -> None:  # noqa: FBT001
    encoded = encode_bar(SERIES, bar, history=history)
    assert decode_bar(encoded, SERIES) == RelayedBar(SERIES, bar, history)
