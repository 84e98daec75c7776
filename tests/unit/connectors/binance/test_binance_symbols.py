"""Symbols that Binance lists."""

from __future__ import annotations

import pytest

from kronos_connectors.binance.symbols import Listing


def _info(base: str, quote: str, status: str = "TRADING", **more: str) -> dict[str, str]:
    return {"symbol": base + quote, "baseAsset": base, "quoteAsset": quote, "status": status} | more


SPOT_INFO = [
    _info("BTC", "USDT"),
    _info("1000SATS", "USDT"),
    _info("USDT", "TRY"),
    _info("LUNA", "USDT", "BREAK"),
    {"symbol": "NOBASE"},
]


FUTURES_INFO = [
    _info("BTC", "USDT", contractType="PERPETUAL", marginAsset="USDT"),
    _info("BTC", "USDT", contractType="CURRENT_QUARTER", marginAsset="USDT")
    | {"symbol": "BTCUSDT_260327"},
    _info("ETH", "BTC", contractType="PERPETUAL", marginAsset="BTC"),
    _info("OLD", "USDT", "SETTLING", contractType="PERPETUAL", marginAsset="USDT"),
]


def test_symbols_are_mapped_to_unified_names() -> None:
    spot, futures = Listing(SPOT_INFO, futures=False), Listing(FUTURES_INFO, futures=True)
    assert spot.venue_symbol("USDT/TRY") == "USDTTRY"
    assert spot.venue_symbol("1000SATS/USDT") == "1000SATSUSDT"
    assert spot.venue_symbol("BTC/USDT:USDT") is None
    assert futures.venue_symbol("BTC/USDT:USDT") == "BTCUSDT"
    assert futures.venue_symbol("ETH/BTC:BTC") == "ETHBTC"
    assert futures.venue_symbol("BTC/USDT") is None
    for symbol in ("BTC/USDT", "USDT/TRY"):
        assert spot.unsupported_reason(symbol) is None


@pytest.mark.parametrize(
    ("symbol", "reason"),
    [
        ("BTC/USDC", "does not list it; did you mean BTC/USDT?"),
        ("BTCUSDT", "did you mean BTC/USDT?"),
        ("btc/usdt", "did you mean BTC/USDT?"),
        ("QQQ/ZZZ", "does not list it"),
    ],
)
def test_unlisted_symbol_gets_a_suggestion(symbol: str, reason: str) -> None:
    assert reason in str(Listing(SPOT_INFO, futures=False).unsupported_reason(symbol))


def test_halted_symbol_is_supported() -> None:
    spot, futures = Listing(SPOT_INFO, futures=False), Listing(FUTURES_INFO, futures=True)
    assert spot.halted_status("LUNA/USDT") == "BREAK"
    assert futures.halted_status("OLD/USDT:USDT") == "SETTLING"
    assert (
        spot.unsupported_reason("LUNA/USDT") is futures.unsupported_reason("OLD/USDT:USDT") is None
    )
    assert spot.halted_status("BTC/USDT") is None
