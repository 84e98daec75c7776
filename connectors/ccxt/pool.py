"""Clients of ccxt that watch an exchange: which to create, and which to close."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

from kronos_connectors._shared.rotating_pool import RotatingPool, Shard
from kronos_connectors.ccxt.client import REQUEST_INTERVAL_SECONDS, Client, Unwatch, Watch
from kronos_stream.backoff import Backoff
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

OVERLAP_SECONDS = 30.0
"""An old client stays open this long beside its successor."""

_MIN_REFUSAL_SECONDS, _MAX_REFUSAL_SECONDS = 60.0, 3_600.0
"""Delay before a refused series is tried again."""

_Shard: TypeAlias = Shard[Client, Series]


class ClientPool(RotatingPool[Client, Series, Watch | Unwatch]):
    """Keeps every series watched.

    Clients watch series of one timeframe only: some of ccxt's classes (Kraken's) mix up the
    updates of a symbol that is watched in two.
    """

    open_interval_seconds = 0.2
    overlap_seconds = OVERLAP_SECONDS
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
        """Retry a series that cannot be watched later; the client keeps its other series."""
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

    def _create(self, shard: _Shard, now: float, lifetime: float) -> Client:
        return Client(
            shard,
            next(iter(shard.subscriptions)).timeframe,
            self._stall,
            expires_at=now + lifetime,
            max_unneeded=self._capacity // 2,
            last_activity=now,
            last_candle=now,
            last_request_at=now - REQUEST_INTERVAL_SECONDS,
        )
