"""Where candles come from: what a connector is to the daemon."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol, runtime_checkable

from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series


class SourceError(Exception):
    """A venue did not answer, or not as it should; worth trying again.

    retry_after: seconds the venue asks to wait, 0 where it names none.
    """

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class LoginRefused(SourceError):  # noqa: N818
    """We are not let in until somebody changes something: a password, a certificate, a setting."""


class VenueRefused(SourceError):  # noqa: N818
    """The venue will not serve us (451, 403); trying again is no use."""


@dataclass(frozen=True, slots=True)
class Traits:
    """How a venue behaves, so that the tape can judge what it says and does not say."""

    push_seconds: float = 2.0
    """How often an open bar is pushed while it trades."""
    grace_seconds: float = 2.0
    """How long after its close a bar's last word may take before REST is asked."""
    history_lag_seconds: float | None = None
    """How long after its close, or its change, history may not know of a bar yet; None takes 5.

    0 where history is complete at once: files.
    """
    fills_empty: bool = False
    """True where the venue sends flat bars for intervals without trades."""


@dataclass(frozen=True, slots=True)
class SourceCallbacks:
    """The daemon's side of a source. Every call returns at once and never fails for bad data."""

    update: Callable[[Update], None]
    reject: Callable[[Series | None, str, bytes], None]
    """A frame or candle that cannot be: series if known, reason, the raw bytes."""
    count_event: Callable[[str], None]
    """Something worth counting, in two words at most: "connected", "lost", "rate limited"."""


class Source(Protocol):
    """One venue's live candles and their history."""

    venue: str
    traits: Traits

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:
        """Which of ``series`` the venue does not have, and why; SourceError if it cannot say."""

    def subscribe(self, series: Collection[Series]) -> None:
        """Set what to push; may be called while running, those kept lose nothing."""

    async def run(self, callbacks: SourceCallbacks) -> None:
        """Push updates until cancelled, reconnecting by itself.

        Returns early only where the data end (a replay); raises VenueRefused only where the
        venue is lost for good.
        """

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        """The closed bars that the venue has with start <= open < end, ascending.

        Never a bar that is still open. SourceError when it must be asked again.
        """

    async def close(self) -> None:
        """Let go of sockets; bounded."""


@runtime_checkable
class RankingSource(Protocol):
    """A source that knows which symbols are traded most."""

    async def ranked(self, pattern: str) -> Sequence[str]:
        """Symbols that trade now, of the kind that ``pattern`` is, the most traded first.

        By the turnover of the last 24 hours. SourceError when it must be asked again.
        """


@dataclass(frozen=True, slots=True)
class SourceConnector:
    """What an entry point of the group ``kronos_stream.sources`` names.

    It serves the venue of the entry point's name, and those whose names begin with that and a dot;
    its settings are ``KRONOS_STREAM_<NAME>__<FIELD>``.
    """

    options: type[Any]
    """A pydantic model, every field with a default or a clear error."""
    build: Callable[[str, Any, Clock, Random], Source]
    """Makes the source of a venue, with these options."""
    venues: Callable[[], Collection[str]] = tuple
    """What else it serves, where no other connector is called so."""
