"""What a tape asks of its owner: small values, in the order in which they are to be carried out."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from kronos_stream.market.candle import Bar, Candle

NEVER = 1 << 62
"""A moment that does not come, UTC ms."""


class Begin(NamedTuple):
    """The tape begins: bars that open up to ``origin`` have closed already."""

    origin: int


class Append(NamedTuple):
    """The next bar has closed."""

    bar: Bar


class Revise(NamedTuple):
    """The venue changed a bar after its close, or has come to have it; its revision is one up."""

    bar: Bar
    newest: bool


class Confirm(NamedTuple):
    """A bar that could not be had is not there: synthetic it was and stays, with a date to it."""

    bar: Bar


class Fetch(NamedTuple):
    """Ask the venue for its closed bars with start <= open < end, and report what it said."""

    start: int
    end: int


class Gap(NamedTuple):
    """Bars with start <= open < end were not pushed, although later ones were."""

    start: int
    end: int


class Reject(NamedTuple):
    """A candle that cannot be."""

    candle: Candle
    reason: str


class Silence(NamedTuple):
    """Nothing is heard of the series any more, or something is again."""

    silent: bool


Effect: TypeAlias = Begin | Append | Revise | Confirm | Fetch | Gap | Reject | Silence
