"""What is followed: the watchlist's symbols, and those that its patterns stand for today."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from kronos_stream.daemon.settings import SettingsError
from kronos_stream.market.series import Series
from kronos_stream.market.source import Ranking, Source
from kronos_stream.market.watchlist import Entry

REFRESH_SECONDS = 86_400.0
"""How often a venue is asked anew what a pattern stands for."""


async def resolve(
    entries: Sequence[Entry], sources: Mapping[str, Source], held: Collection[Series]
) -> frozenset[Series]:
    """The series of ``entries``.

    held: what was followed before; of a pattern's, those that are not far down stay.
    Raises SettingsError for what no venue can answer, SourceError where one does not.
    """
    chosen: set[Series] = set()
    problems: list[str] = []
    for entry in entries:
        source = sources.get(entry.venue)
        if source is None:
            problems.append(f"{entry.venue}: not among the venues at the start; restart")
        elif not entry.is_pattern:
            chosen.update(entry.series())
        elif not isinstance(source, Ranking):
            problems.append(f"{entry}: {entry.venue} cannot say what is traded most; name symbols")
        else:
            known = {one.symbol for one in held if one.venue == entry.venue}
            symbols = entry.chosen(await source.ranked(entry.symbol), known)
            if not symbols:
                problems.append(f"{entry}: nothing that trades there is called so")
            chosen.update(entry.series(symbols))
    if problems:
        raise SettingsError(problems)
    return frozenset(chosen)
