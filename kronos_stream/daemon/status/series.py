"""What is known of each series, for whoever looks: how its tape stands, and what came of its bars.

Nothing here is durable: a restart begins with an empty board, filled by the next bar closes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from kronos_stream.daemon.requests import ForecastResult, Outcome
from kronos_stream.interfaces.sink import Envelope
from kronos_stream.market.candle import Bar
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series
from kronos_stream.market.utc import rfc3339

SeriesStatus = Literal["starting", "live", "held", "silent", "late"]
SERIES_STATUSES = get_args(SeriesStatus)

LATE_MS = 60_000
"""A series that lacks its next bar for so long after its close is late, whoever is to blame."""

MAX_BYTES = 64 * 2**20
"""Of newest forecasts in memory; those that were not renewed for longest are let go."""


class SequencerView(Protocol):
    """How the bars of a series stand: a tape, or what is known of somebody else's."""

    @property
    def last(self) -> Bar | None: ...
    @property
    def next(self) -> int | None: ...
    @property
    def silent(self) -> bool: ...
    @property
    def has_gap(self) -> bool: ...
    @property
    def pending_count(self) -> int: ...
    @property
    def placeholder_count(self) -> int: ...


class TrackedSeries(Protocol):
    """What is known of a series, as far as it is looked at."""

    @property
    def sequencer(self) -> SequencerView: ...


@dataclass(slots=True)
class _LatestResult:
    """What came of a series' bars lately."""

    outcome: Outcome
    forecast: Mapping[str, Any] | None = None
    """Of the newest forecast, what the page tells."""


class SeriesStatusRegistry:
    """One daemon's series. Told by the press, asked by the pages; reads tapes, changes nothing."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._tracked: Callable[[], Mapping[Series, TrackedSeries]] = dict
        self._tracked_since = 0
        self._latest: dict[str, _LatestResult] = {}
        self._messages: dict[str, bytes] = {}
        self._bytes = 0

    def track(self, tracked: Callable[[], Mapping[Series, TrackedSeries]]) -> None:
        """Tell of what is followed from now on."""
        self._tracked, self._tracked_since = tracked, self._clock.now()

    def record(self, results: Sequence[ForecastResult], messages: Sequence[Envelope]) -> None:
        """Take in what came of due bars, and the messages of those that were forecast."""
        for result in results:
            said = self._latest.setdefault(
                result.request.series.name, _LatestResult(result.outcome)
            )
            said.outcome = result.outcome
            if result.outlook is not None:
                said.forecast = _forecast_summary(result)
        for message in messages:
            self._store_message(message.key, message.value)
        if len(self._latest) > len(followed := self._tracked()):
            names = {series.name for series in followed}
            for gone in self._latest.keys() - names:
                del self._latest[gone]
                self._bytes -= len(self._messages.pop(gone, b""))

    def latest_forecast(self, name: str) -> bytes:
        """The newest forecast message of a series, as on the topic.

        Raises LookupError, which says in words why there is none.
        """
        if not self._is_tracked(name):
            raise LookupError(f"no series {name[:200]} is followed; /series lists those that are")
        message, said = self._messages.get(name), self._latest.get(name)
        if message is not None:
            return message
        if said is None:
            raise LookupError(f"{name}: no bar has closed since this process began to follow it")
        if said.forecast is not None:
            raise LookupError(f"{name}: its newest forecast is not in memory any more; see a sink")
        raise LookupError(f"{name}: its newest bar was not forecast ({said.outcome.reason})")

    def silent_venues(self, venues: Collection[str]) -> Mapping[str, str]:
        """Of which of ``venues`` not one series is heard: why, in words."""
        now, quiet = self._clock.now(), set(venues)
        followed = self._tracked()
        for series, one in followed.items():
            if series.venue in quiet and self._is_active(series, one.sequencer, now):
                quiet.discard(series.venue)
            if not quiet:
                break
        counts = {venue: sum(one.venue == venue for one in followed) for venue in quiet}
        return {
            venue: f"nothing is heard of any of its {count} series"
            for venue, count in counts.items()
            if count
        }

    def statuses(self) -> Iterator[tuple[str, str, SeriesStatus]]:
        """Of each series its venue, timeframe and standing; looked at as they are asked for."""
        for series, one in list(self._tracked().items()):
            standing = self._status(series, one.sequencer, self._clock.now())
            yield series.venue, str(series.timeframe), standing

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """A page's row per series, by name; the tapes are read as the rows are asked for."""
        for series, one in sorted(self._tracked().items(), key=lambda item: item[0].name):
            tape, said = one.sequencer, self._latest.get(series.name)
            last, coming = tape.last, tape.next
            yield {
                "series": series.name,
                "state": self._status(series, tape, self._clock.now()),
                "last_bar": last
                and {
                    "open_time": rfc3339(last.candle.time),
                    "close": last.candle.close,
                    "revision": last.revision,
                    "synthetic": last.synthetic,
                },
                "next_due": None if coming is None else rfc3339(series.timeframe.after(coming)),
                "held": tape.pending_count,
                "owed": tape.placeholder_count,
                "last_outcome": said and _outcome_summary(said.outcome),
                "last_forecast": said and said.forecast,
            }

    def _is_tracked(self, name: str) -> bool:
        try:
            return Series.parse(name) in self._tracked()
        except ValueError:
            return False

    def _is_active(self, series: Series, tape: SequencerView, now: int) -> bool:
        standing = self._status(series, tape, now)
        if standing == "starting":
            return now - self._tracked_since <= LATE_MS
        return standing not in {"silent", "late"}

    def _status(self, series: Series, tape: SequencerView, now: int) -> SeriesStatus:
        if tape.next is None:
            return "starting"
        if tape.silent:
            return "silent"
        if now > series.timeframe.after(tape.next) + LATE_MS:
            return "late"
        return "held" if tape.has_gap else "live"

    def _store_message(self, name: str, message: bytes) -> None:
        self._bytes += len(message) - len(self._messages.pop(name, b""))
        self._messages[name] = message
        while self._bytes > MAX_BYTES:
            self._bytes -= len(self._messages.pop(next(iter(self._messages))))


def _outcome_summary(outcome: Outcome) -> Mapping[str, Any]:
    _, origin, revision, result, reason = outcome
    return {
        "origin": rfc3339(origin),
        "revision": revision,
        "result": result,
        "reason": reason or None,
    }


def _forecast_summary(result: ForecastResult) -> Mapping[str, Any]:
    due, window = result.request, result.window
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
