"""The symbols file: one entry of the watchlist per line."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from kronos_stream.daemon.config.text_files import read_text_file
from kronos_stream.market.watchlist import WatchlistEntry

_MAX_LINE_LENGTH = 400
_MAX_PROBLEMS = 20


def read_symbols_file(
    path: Path, setting: str, listed: Collection[WatchlistEntry]
) -> tuple[list[WatchlistEntry], list[str]]:
    """Return the entries of a file and what is wrong with it, one line per problem.

    setting: variable that names the file. listed: entries from elsewhere, which must not recur.
    """
    source = f"{setting}={path}"
    try:
        lines = read_text_file(path, "utf-8-sig").splitlines()
    except ValueError as error:
        return [], [f"{source}: {error}"]
    entries: list[WatchlistEntry] = []
    problems = []
    for number, line in enumerate(lines, 1):
        if text := line.partition("#")[0].strip():
            try:
                entries.append(_parse_line(text, [*listed, *entries]))
            except ValueError as error:
                problems.append(f"{source}, line {number}: {error}")
    if len(problems) > _MAX_PROBLEMS:
        more = f"{source}: and {len(problems) - _MAX_PROBLEMS:,} more lines"
        problems = [*problems[:_MAX_PROBLEMS], more]
    return entries, problems


def _parse_line(text: str, earlier: Collection[WatchlistEntry]) -> WatchlistEntry:
    if len(text) > _MAX_LINE_LENGTH:
        raise ValueError(f"{text[:80]!r}… is too long: {len(text):,} characters")
    entry = WatchlistEntry.parse(text)
    if any(entry[:2] == other[:2] for other in earlier):
        raise ValueError(f"{text} is listed twice")
    return entry
