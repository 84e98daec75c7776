"""What is known of each series, for whoever looks: how its tape stands, and what came of its bars.

Nothing here is durable: a restart begins with an empty board, filled by the next bar closes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from kronos_stream.daemon.due import Outcome, Result
from kronos_stream.daemon.outbox import Message
from kronos_stream.market.candle import Bar
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series
from kronos_stream.market.utc import rfc3339

Standing = Literal["starting", "live", "held", "silent", "late"]
STANDINGS = get_args(Standing)

LATE_MS = 60_000
"""A series that lacks its next bar for so long after its close is late, whoever is to blame."""

MOST_BYTES = 64 * 2**20
"""Of newest forecasts in memory; those that were not renewed for longest are let go."""


class Traced(Protocol):
    """How the bars of a series stand: a tape, or what is known of somebody else's."""

    @property
    def last(self) -> Bar | None: ...
    @property
    def next(self) -> int | None: ...
    @property
    def silent(self) -> bool: ...
    @property
    def holed(self) -> bool: ...
    @property
    def held(self) -> int: ...
    @property
    def owed(self) -> int: ...


class Followed(Protocol):
    """What is known of a series, as far as it is looked at."""

    @property
    def tape(self) -> Traced: ...


@dataclass(slots=True)
class _Said:
    """What came of a series' bars lately."""

    outcome: Outcome
    forecast: Mapping[str, Any] | None = None
    """Of the newest forecast, what the page tells."""


class Board:
    """One daemon's series. Told by the press, asked by the pages; reads tapes, changes nothing."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._followed: Callable[[], Mapping[Series, Followed]] = dict
        self._since = 0
        self._said: dict[str, _Said] = {}
        self._messages: dict[str, bytes] = {}
        self._bytes = 0

    def look_at(self, followed: Callable[[], Mapping[Series, Followed]]) -> None:
        """Tell of what is followed from now on."""
        self._followed, self._since = followed, self._clock.now()

    def told(self, results: Sequence[Result], messages: Sequence[Message]) -> None:
        """Take in what came of due bars, and the messages of those that were forecast."""
        for result in results:
            said = self._said.setdefault(result.due.series.name, _Said(result.outcome))
            said.outcome = result.outcome
            if result.outlook is not None:
                said.forecast = _told(result)
        for message in messages:
            self._keep(message.key, message.value)
        if len(self._said) > len(followed := self._followed()):
            names = {series.name for series in followed}
            for gone in self._said.keys() - names:
                del self._said[gone]
                self._bytes -= len(self._messages.pop(gone, b""))

    def forecast(self, name: str) -> bytes:
        """The newest forecast message of a series, as on the topic.

        Raises LookupError, which says in words why there is none.
        """
        if not self._follows(name):
            raise LookupError(f"no series {name[:200]} is followed; /series lists those that are")
        message, said = self._messages.get(name), self._said.get(name)
        if message is not None:
            return message
        if said is None:
            raise LookupError(f"{name}: no bar has closed since this process began to follow it")
        if said.forecast is not None:
            raise LookupError(f"{name}: its newest forecast is not in memory any more; see a sink")
        raise LookupError(f"{name}: its newest bar was not forecast ({said.outcome.reason})")

    def silent(self, venues: Collection[str]) -> Mapping[str, str]:
        """Of which of ``venues`` not one series is heard: why, in words."""
        now, quiet = self._clock.now(), set(venues)
        followed = self._followed()
        for series, one in followed.items():
            if series.venue in quiet and self._heard(series, one.tape, now):
                quiet.discard(series.venue)
            if not quiet:
                break
        counts = {venue: sum(one.venue == venue for one in followed) for venue in quiet}
        return {
            venue: f"nothing is heard of any of its {count} series"
            for venue, count in counts.items()
            if count
        }

    def standings(self) -> Iterator[tuple[str, str, Standing]]:
        """Of each series its venue, timeframe and standing; looked at as they are asked for."""
        for series, one in list(self._followed().items()):
            standing = self._standing(series, one.tape, self._clock.now())
            yield series.venue, str(series.timeframe), standing

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """A page's row per series, by name; the tapes are read as the rows are asked for."""
        for series, one in sorted(self._followed().items(), key=lambda item: item[0].name):
            tape, said = one.tape, self._said.get(series.name)
            last, coming = tape.last, tape.next
            yield {
                "series": series.name,
                "state": self._standing(series, tape, self._clock.now()),
                "last_bar": last
                and {
                    "open_time": rfc3339(last.candle.time),
                    "close": last.candle.close,
                    "revision": last.revision,
                    "synthetic": last.synthetic,
                },
                "next_due": None if coming is None else rfc3339(series.timeframe.after(coming)),
                "held": tape.held,
                "owed": tape.owed,
                "last_outcome": said and _outcome(said.outcome),
                "last_forecast": said and said.forecast,
            }

    def _follows(self, name: str) -> bool:
        try:
            return Series.parse(name) in self._followed()
        except ValueError:
            return False

    def _heard(self, series: Series, tape: Traced, now: int) -> bool:
        standing = self._standing(series, tape, now)
        if standing == "starting":
            return now - self._since <= LATE_MS
        return standing not in {"silent", "late"}

    def _standing(self, series: Series, tape: Traced, now: int) -> Standing:
        if tape.next is None:
            return "starting"
        if tape.silent:
            return "silent"
        if now > series.timeframe.after(tape.next) + LATE_MS:
            return "late"
        return "held" if tape.holed else "live"

    def _keep(self, name: str, message: bytes) -> None:
        self._bytes += len(message) - len(self._messages.pop(name, b""))
        self._messages[name] = message
        while self._bytes > MOST_BYTES:
            self._bytes -= len(self._messages.pop(next(iter(self._messages))))


def _outcome(outcome: Outcome) -> Mapping[str, Any]:
    _, origin, revision, result, reason = outcome
    return {
        "origin": rfc3339(origin),
        "revision": revision,
        "result": result,
        "reason": reason or None,
    }


def _told(result: Result) -> Mapping[str, Any]:
    due, window = result.due, result.window
    reasons = () if window is None else window.reasons
    return {
        "origin": rfc3339(due.origin),
        "revision": due.revision,
        "degraded": bool(reasons),
        "reasons": reasons,
        "latency_ms": {
            "close_to_received": due.received - due.close,
            "queued": result.queued_ms,
            "compute": result.compute_ms,
        },
    }
