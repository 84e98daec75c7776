"""Watchlist: parsing of lines, and selection of symbols by patterns."""

from __future__ import annotations

import pytest

from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.watchlist import WatchlistEntry

MINUTE, HOUR = Timeframe(1, "m"), Timeframe(1, "h")


@pytest.mark.parametrize(
    ("line", "entry"),
    [
        ("binance:BTC/USDT", WatchlistEntry("binance", "BTC/USDT")),
        ("binance:BTC/USDT:USDT", WatchlistEntry("binance", "BTC/USDT:USDT")),
        ("binance:*/USDT?top=50", WatchlistEntry("binance", "*/USDT", 50)),
        ("binance:*/USDT:USDT", WatchlistEntry("binance", "*/USDT:USDT")),
        (
            "ccxt.kraken:BTC/USD 1m,1h",
            WatchlistEntry("ccxt.kraken", "BTC/USD", None, (MINUTE, HOUR)),
        ),
        ("binance:*/USDT?top=2  1m, 1h", WatchlistEntry("binance", "*/USDT", 2, (MINUTE, HOUR))),
    ],
)
def test_line_is_parsed(line: str, entry: WatchlistEntry) -> None:
    assert WatchlistEntry.parse(line) == entry
    assert line.startswith(str(entry))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", "expected venue:symbol"),
        ("BTC/USDT", "expected venue:symbol"),
        ("binance:", "expected venue:symbol"),
        ("binance:BTC/USDT:1m", "ends in a timeframe"),
        ("binance:BTC/USDT?top=5", "expected a pattern"),
        ("binance:*/USDT?top=0", "expected a pattern"),
        ("binance:*/USDT?best=5", "expected a pattern"),
        ("binance:*/USDT?", "expected a pattern"),
        ("binance:BTC/USDT 1x", "timeframe '1x'"),
        ("binance:BTC/USDT 1m,", "timeframe ''"),
    ],
)
def test_invalid_line_is_rejected(line: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        WatchlistEntry.parse(line)


def test_pattern_selects_the_most_traded_matching_symbols() -> None:
    ranked = ["A/USDT", "A/BTC", "B/USDT", "[C]/USDT", "D/USDT"]
    assert WatchlistEntry.parse("x:*/USDT?top=2").select(ranked, ()) == ["A/USDT", "B/USDT"]
    assert WatchlistEntry.parse("x:*/BTC?top=2").select(ranked, ()) == ["A/BTC"]
    assert WatchlistEntry.parse("x:[C]/*").select(ranked, ()) == ["[C]/USDT"]
    assert WatchlistEntry.parse("x:*/USDT").select(ranked, ()) == [
        "A/USDT",
        "B/USDT",
        "[C]/USDT",
        "D/USDT",
    ]


def test_selected_symbol_stays_near_the_limit_and_goes_when_far_below() -> None:
    ten = WatchlistEntry.parse("x:*?top=10")
    ranked = [f"S{i}" for i in range(30)]
    selected = ten.select(ranked, ())
    assert selected == ranked[:10]
    # S9 falls behind S10 and S11 but stays, within the limit.
    ranked.remove("S9")
    ranked.insert(11, "S9")
    assert set(ten.select(ranked, selected)) == set(selected)
    ranked.remove("S9")
    ranked.insert(12, "S9")
    assert set(ten.select(ranked, selected)) == {*selected, "S10"} - {"S9"}


def test_limit_holds_even_if_more_symbols_were_selected_before() -> None:
    ranked = [f"S{i}" for i in range(30)]
    assert WatchlistEntry.parse("x:*?top=5").select(ranked, ranked) == ranked[:5]
