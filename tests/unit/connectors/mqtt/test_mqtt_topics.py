"""Topics from templates."""

from __future__ import annotations

from urllib.parse import unquote

from hypothesis import given
from hypothesis import strategies as st

from kronos_connectors.mqtt.topics import SERIES_FIELDS, TopicTemplate, encode_level, invalid_reason
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe


def test_topic_of_a_series() -> None:
    template = TopicTemplate(
        "kronos/{venue}/{symbol}/{timeframe}", required=SERIES_FIELDS, allowed=SERIES_FIELDS
    )
    perpetual = Series.parse("binance:BTC/USDT:USDT:5m")
    assert template.for_series(perpetual) == "kronos/binance/BTC%2FUSDT:USDT/5m"
    odd = Series.parse("mqtt:50%+#1 é:1M")
    assert template.for_series(odd) == "kronos/mqtt/50%25%2B%231 é/1M"


_SYMBOLS = st.text(min_size=1).filter(lambda text: text.strip(" :") == text)


@given(_SYMBOLS, _SYMBOLS)
def test_symbols_have_different_topics(one: str, other: str) -> None:
    template = TopicTemplate("c/{symbol}/{timeframe}", required={"symbol"}, allowed=SERIES_FIELDS)
    topics = [
        template.for_series(Series.of("mqtt", symbol, Timeframe(1, "m"))) for symbol in (one, other)
    ]
    assert (topics[0] == topics[1]) == (one == other)
    for topic, symbol in zip(topics, (one, other), strict=True):
        assert topic.count("/") == 2
        assert not set("+#") & set(topic)
        assert unquote(topic.split("/")[1]) == symbol


def test_invalid_topics_are_explained() -> None:
    assert invalid_reason("kronos/candles/mqtt/BTC%2FUSDT/1m") is None
    assert "U+0000" in (invalid_reason("a\0b") or "")
    assert "surrogate" in (invalid_reason("\ud800") or "")
    assert invalid_reason("é" * 32_767) is None
    assert "65,536 bytes" in (invalid_reason("é" * 32_768) or "")
    assert encode_level("plain") == "plain"
