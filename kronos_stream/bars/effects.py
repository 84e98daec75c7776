"""Effects of a sequencer: small values for its owner to carry out in order."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from kronos_stream.market.candle import Bar, Candle

NEVER = 1 << 62
"""A moment that is never reached, UTC ms."""


class Begin(NamedTuple):
    """The series starts: bars that open up to ``origin`` have closed already."""

    origin: int


class Append(NamedTuple):
    """The next bar has closed."""

    bar: Bar


class Revise(NamedTuple):
    """A confirmed bar has changed, or replaces a synthetic one; its revision is one up."""

    bar: Bar
    newest: bool


class Confirm(NamedTuple):
    """The venue does not have this bar: the placeholder becomes a synthetic bar for good."""

    bar: Bar


class Fetch(NamedTuple):
    """Request the closed bars with start <= open < end from the venue's history."""

    start: int
    end: int


class Gap(NamedTuple):
    """Bars with start <= open < end were not pushed, although later ones were."""

    start: int
    end: int


class Reject(NamedTuple):
    """An invalid candle."""

    candle: Candle
    reason: str


class Silence(NamedTuple):
    """The series has become silent, or active again."""

    silent: bool


Effect: TypeAlias = Begin | Append | Revise | Confirm | Fetch | Gap | Reject | Silence
