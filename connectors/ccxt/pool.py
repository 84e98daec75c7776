"""Clients of ccxt that watch an exchange: which to create, what each watches, and which to close.

A client is an instance of ccxt's exchange class with sockets of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from kronos_connectors._shared.rotating_pool import (
    NEVER,
    Close,
    Open,
    RotatingPool,
    Shard,
    longest_bar_seconds,
)
from kronos_stream.backoff import Backoff
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

OVERLAP_SECONDS = 30.0
"""An old client stays open this long after its successor has a candle and all subscriptions."""

REQUEST_INTERVAL_SECONDS = 0.35
"""Between two subscriptions of a client: Binance allows five messages a second, pings and pongs
included, and ccxt alone would use them all."""

_MIN_REFUSAL_SECONDS, _MAX_REFUSAL_SECONDS = 60.0, 3_600.0
"""Delay before a refused series is tried again."""


@dataclass(eq=False, slots=True)
class Client:
    """State of one client."""

    opened_at: float
    expires_at: float
    last_activity: float
    """When any frame arrived, including pongs."""
    last_candle: float
    live_since: float = NEVER
    """When its first candle arrived."""
    last_request_at: float = 0.0
    """When it last subscribed to a series."""
    ever_requested: set[Series] = field(default_factory=set)
    """Every series it subscribed to: ccxt never unsubscribes."""
    requested: set[Series] = field(default_factory=set)
    refused_until: dict[Series, float] = field(default_factory=dict)
    """Refused series, and when they are tried again."""
    refusals: dict[Series, Backoff] = field(default_factory=dict)


class Watch(NamedTuple):
    """Watch a series; report :meth:`ClientPool.on_refused` if it cannot be watched."""

    member: Client
    series: Series


class Unwatch(NamedTuple):
    """Stop watching a series."""

    member: Client
    series: Series


Command: TypeAlias = Open[Client] | Watch | Unwatch | Close[Client]
_Shard: TypeAlias = Shard[Client, Series]


class ClientPool(RotatingPool[Client, Series, Watch | Unwatch]):
    """Keeps every series watched.

    Clients watch series of one timeframe only: some of ccxt's classes (Kraken's) mix up the
    updates of a symbol that is watched in two.
    """

    open_interval_seconds = 0.2
    min_lifetime_factor = 0.8
    max_members = 2

    def follow(self, series: Collection[Series]) -> None:
        """Watch exactly these series; those kept stay on their client."""
        self._distribute(set(series))

    def on_activity(self, client: Client, now: float) -> None:
        """Record that any frame arrived."""
        client.last_activity = now

    def on_candle(self, client: Client, series: Series, now: float) -> None:
        """Record that a candle arrived."""
        client.last_activity = client.last_candle = now
        client.live_since = min(client.live_since, now)
        client.refusals.pop(series, None)

    def on_refused(
        self, client: Client, series: Series, now: float, retry_after: float = 0.0
    ) -> None:
        """Try a series that cannot be watched again later; the client's others go on."""
        backoff = client.refusals.get(series)
        if backoff is None:
            backoff = client.refusals[series] = Backoff(
                self._random,
                initial=_MIN_REFUSAL_SECONDS,
                maximum=_MAX_REFUSAL_SECONDS,
                jitter=(0.75, 1.25),
            )
        client.requested.discard(series)
        client.refused_until[series] = now + max(retry_after, backoff.next_delay())

    def _group(self, key: Series) -> Timeframe:
        return key.timeframe

    def _create(self, shard: _Shard, now: float, lifetime: float) -> Client:  # noqa: ARG002
        return Client(
            now,
            now + lifetime,
            last_activity=now,
            last_candle=now,
            last_request_at=now - REQUEST_INTERVAL_SECONDS,
        )

    def _requests(self, shard: _Shard, member: Client, now: float) -> Iterator[Watch | Unwatch]:
        member.refused_until = {
            series: until
            for series, until in member.refused_until.items()
            if until > now and series in shard.subscriptions
        }
        for series in sorted(member.requested - shard.subscriptions):
            member.requested.discard(series)
            yield Unwatch(member, series)
        missing = _unrequested(shard, member)
        if missing and now >= member.last_request_at + REQUEST_INTERVAL_SECONDS:
            series = min(missing)
            member.last_request_at = now
            member.requested.add(series)
            member.ever_requested.add(series)
            yield Watch(member, series)

    def _failure(self, shard: _Shard, member: Client, now: float) -> str:
        if now >= self._stalled_at(member):
            return f"silent for {self._stall:g} s"
        if now >= self._candle_overdue_at(shard, member):
            return f"no candle for {now - member.last_candle:.0f} s"
        return ""

    def _candles_missing(self, shard: _Shard, member: Client, now: float) -> bool:  # noqa: ARG002
        return now < self._stalled_at(member)

    def _expired(self, shard: _Shard, member: Client, now: float) -> bool:
        return now >= self._expires_at(shard, member)

    def _handover_at(self, shard: _Shard, successor: Client) -> float:
        if _unrequested(shard, successor):
            return NEVER
        return max(successor.live_since, successor.last_request_at) + OVERLAP_SECONDS

    def _member_deadlines(self, shard: _Shard, member: Client, now: float) -> Iterator[float]:  # noqa: ARG002
        yield self._stalled_at(member)
        yield self._candle_overdue_at(shard, member)
        yield self._expires_at(shard, member)
        yield from member.refused_until.values()
        if _unrequested(shard, member):
            yield member.last_request_at + REQUEST_INTERVAL_SECONDS

    def _stalled_at(self, client: Client) -> float:
        return client.last_activity + self._stall

    def _candle_overdue_at(self, shard: _Shard, client: Client) -> float:
        return client.last_candle + self._candle_timeout(shard, longest_bar_seconds(shard.group))

    def _expires_at(self, shard: _Shard, client: Client) -> float:
        """End of its lifetime; 0 once it receives too many series that nobody needs."""
        unneeded = len(client.ever_requested - shard.subscriptions)
        return 0.0 if unneeded > self._capacity // 2 else client.expires_at


def _unrequested(shard: _Shard, client: Client) -> set[Series]:
    """Series that the client has yet to subscribe to."""
    return shard.subscriptions - client.requested - client.refused_until.keys()
