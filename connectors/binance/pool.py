"""All websockets to one host as a pure machine: which to open, what to say, which to close.

The streams are spread over shards. A shard has one connection, or two while a new one takes over:
the old one goes only once the new one has heard that all its streams are granted, so nothing is
missed and some things come twice. Times are seconds of any clock that never goes back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple, TypeAlias

from kronos_connectors.binance.connection import NEVER, Connection
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

_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0
HEALTHY_SECONDS = 15.0
"""After so long a connection's shard is forgiven its failures."""

OVERLAP_SECONDS = 2.0
"""How long an old connection goes on beside its successor: what it is being sent still counts."""

MAX_ATTEMPTS, ATTEMPT_WINDOW_SECONDS = 250, 300.0
"""The venue allows an address 300 attempts in five minutes."""

OPEN_INTERVAL_SECONDS = 0.1
"""Between attempts."""

_MAX_TIMEOUT_FACTOR = 64.0
_LONGEST_MONTH_SECONDS = 31 * 86_400.0


class Open(NamedTuple):
    """Connect, and report :meth:`Fleet.opened` or :meth:`Fleet.lost`."""

    member: Connection


class Send(NamedTuple):
    """Send a text message."""

    member: Connection
    message: bytes


class Close(NamedTuple):
    """Let go of the socket; nothing more is to be reported of it."""

    member: Connection
    reason: str
    """Empty where its work is done."""


Command: TypeAlias = Open | Send | Close


class InvalidFrame(NamedTuple):
    """A frame that cannot be."""

    series: Series | None
    reason: str


@dataclass(eq=False, slots=True)
class _Shard:
    """Streams that share a connection."""

    streams: set[str] = field(default_factory=set)
    members: list[Connection] = field(default_factory=list)
    """The oldest first; the newest may still be opening."""
    failures: int = 0
    """Failures since it was last healthy."""
    retry_at: float = 0.0
    candle_timeout_factor: float = 1.0
    """Factor of the time without klines that is still held possible."""


class ConnectionPool:
    """Keeps every stream followed. :attr:`wake` is when :meth:`act` has something to do again.

    After any other call but :meth:`receive` of a kline there may be something to do at once.
    """

    def __init__(
        self, random: Random, *, capacity: int, stall_seconds: float, lifetime_seconds: float
    ) -> None:
        """room: streams per connection, at most."""
        self.next_wakeup = 0.0
        self._random, self._capacity = random, capacity
        self._stall, self._lifetime = stall_seconds, lifetime_seconds
        self._streams: Streams = {}
        self._bar_seconds: dict[str, float] = {}
        self._shards: list[_Shard] = []
        self._attempts: deque[float] = deque(maxlen=MAX_ATTEMPTS)
        self._next_open_at = 0.0

    # -- in --------------------------------------------------------------------------------

    def follow(self, streams: Streams) -> None:
        """Follow exactly these; those kept stay where they are."""
        self._streams = streams
        self._bar_seconds = {
            f"{symbol.lower()}@kline_{interval}": _timeframe_seconds(series)
            for (symbol, interval), series in streams.items()
        }
        new = sorted(
            self._bar_seconds.keys() - {s for shard in self._shards for s in shard.streams}
        )
        for shard in self._shards:
            shard.streams &= self._bar_seconds.keys()
        most = max(-(-len(self._bar_seconds) // self._capacity), 1 if new else 0)
        self._shards += [_Shard() for _ in range(most - len(self._shards))]
        for stream in new:
            min(self._shards, key=lambda shard: len(shard.streams)).streams.add(stream)
        for shard in self._shards:
            for connection in shard.members:
                self._assign(shard, connection)

    def on_opened(self, connection: Connection, now: float) -> None:
        """Its handshake succeeded."""
        connection.on_opened(now)

    def on_lost(self, connection: Connection, now: float, retry_after: float = 0.0) -> None:
        """It could not be opened, or it was ended; ``retry_after``: seconds the venue asks for."""
        if retry_after:
            self._next_open_at = max(self._next_open_at, now + retry_after)
        for shard in self._shards:
            if connection in shard.members:
                self._remove(shard, connection, now)

    def receive(
        self, connection: Connection, frame: bytes | str, now: float
    ) -> Kline | InvalidFrame | Response | ServerShutdown | IgnoredFrame:
        """Take in a frame, whatever it is; returns what it tells."""
        try:
            told = decode(frame, self._streams)
        except FrameError as error:
            connection.on_activity(now)
            return InvalidFrame(error.series, str(error))
        if type(told) is Kline:
            connection.on_candle(now)
            return told
        connection.on_activity(now)
        if type(told) is Response:
            connection.on_response(told, now)
        elif type(told) is ServerShutdown:
            connection.on_shutdown()
        return told

    # -- out -------------------------------------------------------------------------------

    def poll(self, now: float) -> list[Command]:
        """What to do now."""
        commands: list[Command] = []
        for shard in list(self._shards):
            self._reap(shard, now, commands)
            if not shard.streams:
                self._shards.remove(shard)
            elif self._needs_member(shard, now) and now >= max(
                shard.retry_at, self._earliest_open()
            ):
                commands.append(Open(self._open(shard, now)))
            for connection in shard.members:
                message = connection.next_request(now)
                if message is not None:
                    commands.append(Send(connection, message))
        moments = (moment for shard in self._shards for moment in self._deadlines(shard, now))
        # What was due by now is done; if it could not be, word of something else must come first.
        self.next_wakeup = min((moment for moment in moments if moment > now), default=NEVER)
        return commands

    def _reap(self, shard: _Shard, now: float, commands: list[Command]) -> None:
        """Close what is broken, relieved, or without streams."""
        for connection in list(shard.members):
            why = connection.failure(now)
            if why:
                commands.append(Close(connection, why))
                if connection.candle_overdue(now):
                    shard.candle_timeout_factor = min(
                        2 * shard.candle_timeout_factor, _MAX_TIMEOUT_FACTOR
                    )
                self._remove(shard, connection, now)
        kept = shard.members[-1:]
        if not shard.streams:
            kept = []
        elif not (kept and kept[0].granted and now >= kept[0].live_since + OVERLAP_SECONDS):
            return
        for connection in shard.members:
            if connection not in kept:
                commands.append(Close(connection, ""))
                shard.candle_timeout_factor = 1.0
        shard.members = kept

    def _needs_member(self, shard: _Shard, now: float) -> bool:
        if not shard.members:
            return True
        newest = shard.members[-1]
        return newest.live_since <= now and newest.expired(now)

    def _earliest_open(self) -> float:
        """From when on another attempt is within the venue's limit, and its patience."""
        if len(self._attempts) < MAX_ATTEMPTS:
            return self._next_open_at
        return max(self._next_open_at, self._attempts[0] + ATTEMPT_WINDOW_SECONDS)

    def _open(self, shard: _Shard, now: float) -> Connection:
        self._attempts.append(now)
        self._next_open_at = max(self._next_open_at, now + OPEN_INTERVAL_SECONDS)
        shard.retry_at = now + self._backoff(shard.failures)
        connection = Connection(
            stall_seconds=self._stall,
            # Not all of a fleet at the same moment.
            lifetime_seconds=self._lifetime * self._random.uniform(0.9, 1.0),
        )
        self._assign(shard, connection)
        shard.members.append(connection)
        return connection

    def _assign(self, shard: _Shard, connection: Connection) -> None:
        shortest = min((self._bar_seconds[stream] for stream in shard.streams), default=NEVER)
        connection.assign(shard.streams, shard.candle_timeout_factor * (shortest + 2 * self._stall))

    def _remove(self, shard: _Shard, connection: Connection, now: float) -> None:
        shard.members.remove(connection)
        if now >= connection.live_since + HEALTHY_SECONDS:
            shard.failures = 0
        shard.retry_at = now + self._backoff(shard.failures)
        shard.failures += 1

    def _backoff(self, tries: int) -> float:
        most = min(_SHORTEST_PAUSE_SECONDS * 2.0 ** min(tries, 10), _LONGEST_PAUSE_SECONDS)
        return most * self._random.uniform(0.5, 1.0)

    def _deadlines(self, shard: _Shard, now: float) -> Iterator[float]:
        for connection in shard.members:
            yield connection.next_wakeup(now)
        if self._needs_member(shard, now):
            yield max(shard.retry_at, self._earliest_open())
        if len(shard.members) > 1:
            yield shard.members[-1].live_since + OVERLAP_SECONDS


def _timeframe_seconds(series: Series) -> float:
    length = series.timeframe.milliseconds
    return _LONGEST_MONTH_SECONDS * series.timeframe.count if length is None else length / 1000
