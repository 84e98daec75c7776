"""Status of each series: state of its bars, last outcome, latest forecast.

Kept in memory only: after a restart, outcomes and forecasts appear with the next closed bars.
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
"""A series is late if its next bar is missing for so long after the bar's close."""

MAX_BYTES = 64 * 2**20
"""Limit for forecast messages in memory; beyond it, the least recently updated are removed."""


class SequencerView(Protocol):
    """State of a series' bars: a sequencer, or a candle record of a remote one."""

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
    """A followed series."""

    @property
    def sequencer(self) -> SequencerView: ...


@dataclass(slots=True)
class _LatestResult:
    outcome: Outcome
    forecast: Mapping[str, Any] | None = None
    """Summary of the latest forecast."""


class SeriesStatusRegistry:
    """Status of all series of a daemon: updated by the publisher, read by the endpoints."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._tracked: Callable[[], Mapping[Series, TrackedSeries]] = dict
        self._tracked_since = 0
        self._latest: dict[str, _LatestResult] = {}
        self._messages: dict[str, bytes] = {}
        self._bytes = 0

    def track(self, tracked: Callable[[], Mapping[Series, TrackedSeries]]) -> None:
        """Set the function that returns the followed series."""
        self._tracked, self._tracked_since = tracked, self._clock.now()

    def record(self, results: Sequence[ForecastResult], messages: Sequence[Envelope]) -> None:
        """Record results of forecast requests, and messages of the forecasts among them."""
        for result in results:
            name = result.request.series.name
            latest = self._latest.setdefault(name, _LatestResult(result.outcome))
            latest.outcome = result.outcome
            if result.outlook is not None:
                latest.forecast = _forecast_summary(result)
        for message in messages:
            self._store_message(message.key, message.value)
        if len(self._latest) > len(tracked := self._tracked()):
            for name in self._latest.keys() - {series.name for series in tracked}:
                del self._latest[name]
                self._bytes -= len(self._messages.pop(name, b""))

    def latest_forecast(self, name: str) -> bytes:
        """Return the latest forecast message of a series, as on the topic.

        Raises LookupError that explains why there is none.
        """
        if not self._is_tracked(name):
            raise LookupError(f"{name[:200]} is not followed; /series lists all followed series")
        message, latest = self._messages.get(name), self._latest.get(name)
        if message is not None:
            return message
        if latest is None:
            raise LookupError(f"{name}: no bar has closed since this process started to follow it")
        if latest.forecast is not None:
            raise LookupError(f"{name}: its latest forecast is not in memory any more; see a sink")
        raise LookupError(f"{name}: its latest bar was not forecast ({latest.outcome.reason})")

    def silent_venues(self, venues: Collection[str]) -> Mapping[str, str]:
        """Return those of ``venues`` none of whose series is up to date, with a description."""
        now, silent = self._clock.now(), set(venues)
        tracked = self._tracked()
        for series, state in tracked.items():
            if series.venue in silent and self._is_active(series, state.sequencer, now):
                silent.discard(series.venue)
            if not silent:
                break
        counts = {venue: sum(series.venue == venue for series in tracked) for venue in silent}
        return {
            venue: f"no data for any of its {count} series"
            for venue, count in counts.items()
            if count
        }

    def statuses(self) -> Iterator[tuple[str, str, SeriesStatus]]:
        """Venue, timeframe and state of each series, computed lazily."""
        for series, state in list(self._tracked().items()):
            status = self._status(series, state.sequencer, self._clock.now())
            yield series.venue, str(series.timeframe), status

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Rows of /series, sorted by name and computed lazily."""
        for series, state in sorted(self._tracked().items(), key=lambda item: item[0].name):
            sequencer, latest = state.sequencer, self._latest.get(series.name)
            last, upcoming = sequencer.last, sequencer.next
            yield {
                "series": series.name,
                "state": self._status(series, sequencer, self._clock.now()),
                "last_bar": last
                and {
                    "open_time": rfc3339(last.candle.time),
                    "close": last.candle.close,
                    "revision": last.revision,
                    "synthetic": last.synthetic,
                },
                "next_due": None if upcoming is None else rfc3339(series.timeframe.after(upcoming)),
                "held": sequencer.pending_count,
                "owed": sequencer.placeholder_count,
                "last_outcome": latest and _outcome_summary(latest.outcome),
                "last_forecast": latest and latest.forecast,
            }

    def _is_tracked(self, name: str) -> bool:
        try:
            return Series.parse(name) in self._tracked()
        except ValueError:
            return False

    def _is_active(self, series: Series, sequencer: SequencerView, now: int) -> bool:
        status = self._status(series, sequencer, now)
        if status == "starting":
            return now - self._tracked_since <= LATE_MS
        return status not in {"silent", "late"}

    def _status(self, series: Series, sequencer: SequencerView, now: int) -> SeriesStatus:
        if sequencer.next is None:
            return "starting"
        if sequencer.silent:
            return "silent"
        if now > series.timeframe.after(sequencer.next) + LATE_MS:
            return "late"
        return "held" if sequencer.has_gap else "live"

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
    request, window = result.request, result.window
    reasons = () if window is None else window.reasons
    return {
        "origin": rfc3339(request.origin),
        "revision": request.revision,
        "degraded": bool(reasons),
        "reasons": reasons,
        "latency_ms": {
            "close_to_received": request.received - request.close,
            "queued": result.queued_ms,
            "compute": result.compute_ms,
        },
    }
