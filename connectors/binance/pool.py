"""Websockets to one host: which to open, what to send on them, and which to close."""

from __future__ import annotations

from collections import deque
from random import Random
from typing import NamedTuple, TypeAlias

from kronos_connectors._shared.rotating_pool import NEVER, Close, Open, RotatingPool, Shard
from kronos_connectors.binance.connection import Connection, Send
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
from kronos_stream.market.timeframe import Timeframe

OVERLAP_SECONDS = 2.0
"""An old connection stays open this long beside its successor, for updates in transit."""

MAX_ATTEMPTS, ATTEMPT_WINDOW_SECONDS = 250, 300.0
"""Binance allows an address 300 connection attempts in five minutes."""

OPEN_INTERVAL_SECONDS = 0.1

Command: TypeAlias = Open[Connection] | Send | Close[Connection]
_Shard: TypeAlias = Shard[Connection, str]


class InvalidFrame(NamedTuple):
    """A frame that is not valid."""

    series: Series | None
    reason: str


class ConnectionPool(RotatingPool[Connection, str, Send]):
    """Keeps every stream subscribed; report each frame to :meth:`receive`."""

    open_interval_seconds = OPEN_INTERVAL_SECONDS
    overlap_seconds = OVERLAP_SECONDS
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
        self._timeframes: dict[str, Timeframe] = {}
        self._attempts: deque[float] = deque(maxlen=MAX_ATTEMPTS)

    def follow(self, streams: Streams) -> None:
        """Subscribe to exactly these streams; those kept stay on their connection."""
        self._streams = streams
        self._timeframes = {
            f"{symbol.lower()}@kline_{interval}": series.timeframe
            for (symbol, interval), series in streams.items()
        }
        self._distribute(self._timeframes.keys())
        for shard in self._shards:
            for connection in shard.members:
                self._assign(shard, connection)

    def on_opened(self, connection: Connection, now: float) -> None:
        """Record a successful handshake."""
        connection.on_opened(now)

    def receive(
        self, connection: Connection, frame: bytes | str, now: float
    ) -> Kline | InvalidFrame | Response | ServerShutdown | IgnoredFrame:
        """Decode a frame and record what it means for its connection."""
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
        timeframes = {self._timeframes[stream] for stream in shard.subscriptions}
        timeouts = (shard.candle_timeout(timeframe, self._stall) for timeframe in timeframes)
        connection.assign(shard.subscriptions, min(timeouts, default=NEVER))
