"""Watchlist: parsing of lines, and selection of symbols by patterns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest

from kronos_stream.daemon.config.settings import SettingsError
from kronos_stream.daemon.intake.universe import resolve
from kronos_stream.market.series import Series
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


class _Ranking:
    def __init__(self, *ranked: str) -> None:
        self._ranked = ranked

    async def ranked(self, pattern: str) -> Sequence[str]:  # noqa: ARG002
        return self._ranked


async def _resolve_names(
    lines: Sequence[str], sources: Mapping[str, Any], current: Collection[str] = ()
) -> set[str]:
    entries = [WatchlistEntry.parse(line)._replace(timeframes=(MINUTE,)) for line in lines]
    known = [Series.parse(name) for name in current]
    return {one.name for one in await resolve(entries, sources, known)}


async def test_named_and_selected_symbols_together() -> None:
    sources = {"x": _Ranking("A/B", "C/B", "D/B"), "y": object()}
    names = await _resolve_names(["x:*?top=2", "y:Q/B", "x:D/B", "x:A/B"], sources)
    assert names == {"x:A/B:1m", "x:C/B:1m", "x:D/B:1m", "y:Q/B:1m"}


async def test_current_symbols_of_one_venue_do_not_count_for_another() -> None:
    sources = {"x": _Ranking("A/B", "C/B"), "y": _Ranking("A/B", "C/B")}
    names = await _resolve_names(["x:*?top=1", "y:*?top=1"], sources, ["x:C/B:1m"])
    assert names == {"x:A/B:1m", "y:A/B:1m"}


async def test_named_symbol_does_not_count_for_the_limit_of_a_pattern() -> None:
    ranked = [f"S{i}/B" for i in range(20)]
    sources = {"x": _Ranking(*ranked)}
    current = [f"x:{symbol}:1m" for symbol in [*ranked[:10], "S11/B"]]
    names = await _resolve_names(["x:*?top=10", "x:S11/B"], sources, current)
    assert names == set(current)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("x:*/USDT", "x:*/USDT: no traded symbol matches"),
        ("y:*?top=3", "y:*?top=3: y cannot rank symbols; name them"),
        ("z:A/B", "z: not configured at the start; restart to add it"),
    ],
)
async def test_unresolvable_line_is_reported(line: str, why: str) -> None:
    with pytest.raises(SettingsError) as raised:
        await _resolve_names([line], {"x": _Ranking("A/B"), "y": object()})
    assert raised.value.problems == (why,)
