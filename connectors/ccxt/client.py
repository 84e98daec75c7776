"""State of one client of ccxt, an instance of an exchange class with sockets of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from kronos_connectors._shared.rotating_pool import NEVER, Shard
from kronos_stream.backoff import Backoff
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

REQUEST_INTERVAL_SECONDS = 0.35
"""Time between two subscriptions of a client: Binance allows five messages a second, pings and
pongs included, and ccxt alone would use them all."""


class Watch(NamedTuple):
    """Watch a series; report :meth:`ClientPool.on_refused` if it cannot be watched."""

    member: Client
    series: Series


class Unwatch(NamedTuple):
    """Stop watching a series."""

    member: Client
    series: Series


@dataclass(eq=False, slots=True)
class Client:
    """Watches the series of its shard, all of ``timeframe``.

    Times are seconds of the event loop's clock.
    """

    shard: Shard[Client, Series]
    timeframe: Timeframe
    stall_seconds: float
    expires_at: float
    max_unneeded: int
    """Number of unneeded series beyond which it is replaced early."""
    last_activity: float
    """Arrival of the last frame, pongs included."""
    last_candle: float
    last_request_at: float
    """Time of its last subscription request."""
    live_since: float = NEVER
    requested: set[Series] = field(default_factory=set)
    ever_requested: set[Series] = field(default_factory=set)
    """Every series it subscribed to: ccxt never unsubscribes."""
    refused_until: dict[Series, float] = field(default_factory=dict)
    """Refused series, and when they are tried again."""
    refusals: dict[Series, Backoff] = field(default_factory=dict)

    @property
    def complete_since(self) -> float:
        return NEVER if self._missing() else max(self.live_since, self.last_request_at)

    def requests(self, now: float) -> Iterator[Watch | Unwatch]:
        wanted = self.shard.subscriptions
        self.refused_until = {
            series: until
            for series, until in self.refused_until.items()
            if until > now and series in wanted
        }
        for series in sorted(self.requested - wanted):
            self.requested.discard(series)
            yield Unwatch(self, series)
        missing = self._missing()
        if missing and now >= self.last_request_at + REQUEST_INTERVAL_SECONDS:
            series = min(missing)
            self.last_request_at = now
            self.requested.add(series)
            self.ever_requested.add(series)
            yield Watch(self, series)

    def failure(self, now: float) -> str:
        if now >= self._stalled_at:
            return f"silent for {self.stall_seconds:g} s"
        return f"no candle for {now - self.last_candle:.0f} s" if self.candle_overdue(now) else ""

    def candle_overdue(self, now: float) -> bool:
        return self._candle_due_at <= now < self._stalled_at

    def expired(self, now: float) -> bool:
        return now >= self.expires_at or self._has_many_unneeded

    def next_wakeup(self, now: float) -> float:
        times = [self._stalled_at, self._candle_due_at, self.expires_at]
        times += self.refused_until.values()
        if self._missing():
            times.append(self.last_request_at + REQUEST_INTERVAL_SECONDS)
        return min((time for time in times if time > now), default=NEVER)

    @property
    def _stalled_at(self) -> float:
        return self.last_activity + self.stall_seconds

    @property
    def _candle_due_at(self) -> float:
        return self.last_candle + self.shard.candle_timeout(self.timeframe, self.stall_seconds)

    @property
    def _has_many_unneeded(self) -> bool:
        return len(self.ever_requested - self.shard.subscriptions) > self.max_unneeded

    def _missing(self) -> set[Series]:
        """Series to subscribe to."""
        return self.shard.subscriptions - self.requested - self.refused_until.keys()
