"""Websockets to one host: which to open, what to send on them, and which to close."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from random import Random
from typing import NamedTuple, TypeAlias

from kronos_connectors._shared.rotating_pool import (
    NEVER,
    Close,
    Open,
    RotatingPool,
    Shard,
    longest_bar_seconds,
)
from kronos_connectors.binance.connection import Connection
from kronos_connectors.binance.frames import (
    FrameError,
    IgnoredFrame,
    Kline,
    Response,
    ServerShutdown,
    Streams,
    decode,
)
from kronos_stream.market.series import Series

OVERLAP_SECONDS = 2.0
"""An old connection stays open this long beside its successor, for updates already on their way."""

MAX_ATTEMPTS, ATTEMPT_WINDOW_SECONDS = 250, 300.0
"""Binance allows an address 300 connection attempts in five minutes."""

OPEN_INTERVAL_SECONDS = 0.1

_Shard: TypeAlias = Shard[Connection, str]


class Send(NamedTuple):
    """Send a text message."""

    member: Connection
    message: bytes


Command: TypeAlias = Open[Connection] | Send | Close[Connection]


class InvalidFrame(NamedTuple):
    """A frame that is not valid."""

    series: Series | None
    reason: str


class ConnectionPool(RotatingPool[Connection, str, Send]):
    """Keeps every stream subscribed.

    Report :meth:`on_opened` or :meth:`on_lost` for each :class:`Open`, and each frame to
    :meth:`receive`.
    """

    open_interval_seconds = OPEN_INTERVAL_SECONDS
    min_lifetime_factor = 0.9

    def __init__(
        self, random: Random, *, capacity: int, stall_seconds: float, lifetime_seconds: float
    ) -> None:
        """capacity: most streams of a connection."""
        super().__init__(
            random,
            capacity=capacity,
            stall_seconds=stall_seconds,
            lifetime_seconds=lifetime_seconds,
        )
        self._streams: Streams = {}
        self._bar_seconds: dict[str, float] = {}
        self._attempts: deque[float] = deque(maxlen=MAX_ATTEMPTS)

    def follow(self, streams: Streams) -> None:
        """Subscribe to exactly these streams; those kept stay on their connection."""
        self._streams = streams
        self._bar_seconds = {
            f"{symbol.lower()}@kline_{interval}": longest_bar_seconds(series.timeframe)
            for (symbol, interval), series in streams.items()
        }
        self._distribute(self._bar_seconds.keys())
        for shard in self._shards:
            for connection in shard.members:
                self._assign(shard, connection)

    def on_opened(self, connection: Connection, now: float) -> None:
        """Record a successful handshake."""
        connection.on_opened(now)

    def receive(
        self, connection: Connection, frame: bytes | str, now: float
    ) -> Kline | InvalidFrame | Response | ServerShutdown | IgnoredFrame:
        """Decode a frame and record what it says about its connection."""
        try:
            event = decode(frame, self._streams)
        except FrameError as error:
            connection.on_activity(now)
            return InvalidFrame(error.series, str(error))
        if type(event) is Kline:
            connection.on_candle(now)
            return event
        connection.on_activity(now)
        if type(event) is Response:
            connection.on_response(event, now)
        elif type(event) is ServerShutdown:
            connection.on_shutdown()
        return event

    def _open_at(self, shard: _Shard) -> float:
        allowed_at = super()._open_at(shard)
        if len(self._attempts) < MAX_ATTEMPTS:
            return allowed_at
        return max(allowed_at, self._attempts[0] + ATTEMPT_WINDOW_SECONDS)

    def _create(self, shard: _Shard, now: float, lifetime: float) -> Connection:
        self._attempts.append(now)
        connection = Connection(stall_seconds=self._stall, lifetime_seconds=lifetime)
        self._assign(shard, connection)
        return connection

    def _assign(self, shard: _Shard, connection: Connection) -> None:
        shortest = min((self._bar_seconds[key] for key in shard.subscriptions), default=NEVER)
        connection.assign(shard.subscriptions, self._candle_timeout(shard, shortest))

    def _requests(self, shard: _Shard, member: Connection, now: float) -> Iterator[Send]:  # noqa: ARG002
        message = member.next_request(now)
        if message is not None:
            yield Send(member, message)

    def _failure(self, shard: _Shard, member: Connection, now: float) -> str:  # noqa: ARG002
        return member.failure(now)

    def _candles_missing(self, shard: _Shard, member: Connection, now: float) -> bool:  # noqa: ARG002
        return member.candle_overdue(now)

    def _expired(self, shard: _Shard, member: Connection, now: float) -> bool:  # noqa: ARG002
        return member.expired(now)

    def _handover_at(self, shard: _Shard, successor: Connection) -> float:  # noqa: ARG002
        return successor.live_since + OVERLAP_SECONDS if successor.granted else NEVER

    def _member_deadlines(self, shard: _Shard, member: Connection, now: float) -> Iterator[float]:  # noqa: ARG002
        yield member.next_wakeup(now)
