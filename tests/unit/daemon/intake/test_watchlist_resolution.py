"""Resolution of the watchlist to series, by the rankings of venues."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest

from kronos_stream.daemon.config.settings import SettingsError
from kronos_stream.daemon.intake.universe import resolve
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.watchlist import WatchlistEntry


class _RankedSource:
    """Source that ranks the given symbols."""

    def __init__(self, *ranked: str) -> None:
        self._ranked = ranked

    async def ranked(self, pattern: str) -> Sequence[str]:  # noqa: ARG002
        return self._ranked


async def _resolve_names(
    lines: Sequence[str], sources: Mapping[str, Any], current: Collection[str] = ()
) -> set[str]:
    entries = [
        WatchlistEntry.parse(line)._replace(timeframes=(Timeframe(1, "m"),)) for line in lines
    ]
    known = [Series.parse(name) for name in current]
    return {one.name for one in await resolve(entries, sources, known)}


async def test_named_and_selected_symbols_together() -> None:
    sources = {"x": _RankedSource("A/B", "C/B", "D/B"), "y": object()}
    names = await _resolve_names(["x:*?top=2", "y:Q/B", "x:D/B", "x:A/B"], sources)
    assert names == {"x:A/B:1m", "x:C/B:1m", "x:D/B:1m", "y:Q/B:1m"}


async def test_current_symbols_of_one_venue_do_not_count_for_another() -> None:
    sources = {"x": _RankedSource("A/B", "C/B"), "y": _RankedSource("A/B", "C/B")}
    names = await _resolve_names(["x:*?top=1", "y:*?top=1"], sources, ["x:C/B:1m"])
    assert names == {"x:A/B:1m", "y:A/B:1m"}


async def test_named_symbol_does_not_count_for_the_limit_of_a_pattern() -> None:
    ranked = [f"S{i}/B" for i in range(20)]
    sources = {"x": _RankedSource(*ranked)}
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
        await _resolve_names([line], {"x": _RankedSource("A/B"), "y": object()})
    assert raised.value.problems == (why,)
