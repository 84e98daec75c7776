"""Source interface: live candles and history of a venue."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol, runtime_checkable

from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series


class SourceError(Exception):
    """A venue did not answer, or not correctly; may be retried.

    retry_after: seconds that the venue asks to wait, 0 if it names none. has_remedy: True if the
    message says how to correct the error.
    """

    def __init__(self, message: str, retry_after: float = 0.0, *, has_remedy: bool = False) -> None:
        super().__init__(message)
        self.retry_after, self.has_remedy = retry_after, has_remedy


class LoginRefused(SourceError):  # noqa: N818
    """The venue refuses the login until a password, certificate or setting is changed."""


class VenueRefused(SourceError):  # noqa: N818
    """The venue does not serve this client (451, 403); retrying is useless."""


@dataclass(frozen=True, slots=True)
class Traits:
    """Behaviour of a venue that the bar sequencer relies on."""

    push_seconds: float = 2.0
    """Interval of pushes of an open bar while it trades."""
    grace_seconds: float = 2.0
    """Time after its close within which a bar's closing push is expected, before backfill."""
    history_lag_seconds: float | None = None
    """Time by which the history may lag behind closes and corrections; None means 5.

    0 if history is complete at once: files.
    """
    fills_empty: bool = False
    """True if the venue sends flat bars for intervals without trades."""


MAX_REJECTED_BYTES = 4_096
"""Bytes of an invalid frame that :attr:`SourceCallbacks.reject` is given."""


@dataclass(frozen=True, slots=True)
class SourceCallbacks:
    """Callbacks of the daemon. They return at once and never raise because of bad data."""

    update: Callable[[Update], None]
    reject: Callable[[Series | None, str, bytes], None]
    """Reports an invalid frame or candle: series if known, reason, raw bytes."""
    count_event: Callable[[str], None]
    """Counts an event, two words at most: "connected", "lost", "rate limited"."""


class Source(Protocol):
    """Live candles and history of one venue."""

    venue: str
    traits: Traits

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:
        """Return the series that the venue lacks, with reasons; SourceError if unknown."""

    def subscribe(self, series: Collection[Series]) -> None:
        """Set the series to push; may be called while running, without loss for those kept."""

    async def run(self, callbacks: SourceCallbacks) -> None:
        """Push updates until cancelled, reconnecting as needed.

        Returns early only if the data end (a replay); raises VenueRefused only if retrying is
        useless.
        """

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        """Fetch the closed bars that the venue has with start <= open < end, ascending.

        Never a bar that is still open. Raises SourceError if it must be retried.
        """

    async def close(self) -> None:
        """Release sockets; bounded in time."""


@runtime_checkable
class RankingSource(Protocol):
    """A source that can rank symbols by turnover."""

    async def ranked(self, pattern: str) -> Sequence[str]:
        """Tradable symbols of the pattern's kind, by turnover of the last 24 hours, descending.

        Raises SourceError if it must be retried.
        """


@dataclass(frozen=True, slots=True)
class SourceConnector:
    """Object of an entry point in the group ``kronos_stream.sources``.

    It serves the venue of the entry point's name, and those whose names begin with it and a dot;
    its settings are ``KRONOS_STREAM_<NAME>__<FIELD>``.
    """

    options: type[Any]
    """A pydantic model, every field with a default or a clear error."""
    build: Callable[[str, Any, Clock, Random], Source]
    """Builds the source of a venue."""
    venues: Callable[[], Collection[str]] = tuple
    """Further venues that it serves, unless a connector has their name."""
