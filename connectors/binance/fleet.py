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
    Answer,
    FrameError,
    Kline,
    Other,
    Shutdown,
    Streams,
    decode,
)
from kronos_stream.market.series import Series

_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0
HEALTHY_SECONDS = 15.0
"""After so long a connection's shard is forgiven its failures."""

OVERLAP_SECONDS = 2.0
"""How long an old connection goes on beside its successor: what it is being sent still counts."""

MOST_ATTEMPTS, ATTEMPTS_SECONDS = 250, 300.0
"""The venue allows an address 300 attempts in five minutes."""

SPACING_SECONDS = 0.1
"""Between attempts."""

_MOST_PATIENCE = 64.0
_LONGEST_MONTH_SECONDS = 31 * 86_400.0


class Open(NamedTuple):
    """Connect, and report :meth:`Fleet.opened` or :meth:`Fleet.lost`."""

    connection: Connection


class Send(NamedTuple):
    """Send a text message."""

    connection: Connection
    message: bytes


class Close(NamedTuple):
    """Let go of the socket; nothing more is to be reported of it."""

    connection: Connection
    why: str
    """Empty where its work is done."""


Command: TypeAlias = Open | Send | Close


class Rejected(NamedTuple):
    """A frame that cannot be."""

    series: Series | None
    reason: str


@dataclass(eq=False, slots=True)
class _Shard:
    """Streams that share a connection."""

    streams: set[str] = field(default_factory=set)
    connections: list[Connection] = field(default_factory=list)
    """The oldest first; the newest may still be opening."""
    tries: int = 0
    """Failures since it was last healthy."""
    retry_at: float = 0.0
    patience: float = 1.0
    """Factor of the time without klines that is still held possible."""


class Fleet:
    """Keeps every stream followed. :attr:`wake` is when :meth:`act` has something to do again.

    After any other call but :meth:`receive` of a kline there may be something to do at once.
    """

    def __init__(
        self, random: Random, *, room: int, stall_seconds: float, lifetime_seconds: float
    ) -> None:
        """room: streams per connection, at most."""
        self.wake = 0.0
        self._random, self._room = random, room
        self._stall, self._lifetime = stall_seconds, lifetime_seconds
        self._streams: Streams = {}
        self._lengths: dict[str, float] = {}
        self._shards: list[_Shard] = []
        self._attempts: deque[float] = deque(maxlen=MOST_ATTEMPTS)
        self._open_at = 0.0

    # -- in --------------------------------------------------------------------------------

    def follow(self, streams: Streams) -> None:
        """Follow exactly these; those kept stay where they are."""
        self._streams = streams
        self._lengths = {
            f"{symbol.lower()}@kline_{interval}": _seconds(series)
            for (symbol, interval), series in streams.items()
        }
        new = sorted(self._lengths.keys() - {s for shard in self._shards for s in shard.streams})
        for shard in self._shards:
            shard.streams &= self._lengths.keys()
        most = max(-(-len(self._lengths) // self._room), 1 if new else 0)
        self._shards += [_Shard() for _ in range(most - len(self._shards))]
        for stream in new:
            min(self._shards, key=lambda shard: len(shard.streams)).streams.add(stream)
        for shard in self._shards:
            for connection in shard.connections:
                self._brief(shard, connection)

    def opened(self, connection: Connection, now: float) -> None:
        """Its handshake succeeded."""
        connection.open(now)

    def lost(self, connection: Connection, now: float, retry_after: float = 0.0) -> None:
        """It could not be opened, or it was ended; ``retry_after``: seconds the venue asks for."""
        if retry_after:
            self._open_at = max(self._open_at, now + retry_after)
        for shard in self._shards:
            if connection in shard.connections:
                self._forget(shard, connection, now)

    def receive(
        self, connection: Connection, frame: bytes | str, now: float
    ) -> Kline | Rejected | Answer | Shutdown | Other:
        """Take in a frame, whatever it is; returns what it tells."""
        try:
            told = decode(frame, self._streams)
        except FrameError as error:
            connection.heard(now)
            return Rejected(error.series, str(error))
        if type(told) is Kline:
            connection.kline(now)
            return told
        connection.heard(now)
        if type(told) is Answer:
            connection.answer(told, now)
        elif type(told) is Shutdown:
            connection.retire()
        return told

    # -- out -------------------------------------------------------------------------------

    def act(self, now: float) -> list[Command]:
        """What to do now."""
        commands: list[Command] = []
        for shard in list(self._shards):
            self._dismiss(shard, now, commands)
            if not shard.streams:
                self._shards.remove(shard)
            elif self._needs(shard, now) and now >= max(shard.retry_at, self._may_open()):
                commands.append(Open(self._begin(shard, now)))
            for connection in shard.connections:
                message = connection.request(now)
                if message is not None:
                    commands.append(Send(connection, message))
        moments = (moment for shard in self._shards for moment in self._moments(shard, now))
        # What was due by now is done; if it could not be, word of something else must come first.
        self.wake = min((moment for moment in moments if moment > now), default=NEVER)
        return commands

    def _dismiss(self, shard: _Shard, now: float, commands: list[Command]) -> None:
        """Close what is broken, relieved, or without streams."""
        for connection in list(shard.connections):
            why = connection.broken(now)
            if why:
                commands.append(Close(connection, why))
                if connection.quiet(now):
                    shard.patience = min(2 * shard.patience, _MOST_PATIENCE)
                self._forget(shard, connection, now)
        kept = shard.connections[-1:]
        if not shard.streams:
            kept = []
        elif not (kept and kept[0].granted and now >= kept[0].live_since + OVERLAP_SECONDS):
            return
        for connection in shard.connections:
            if connection not in kept:
                commands.append(Close(connection, ""))
                shard.patience = 1.0
        shard.connections = kept

    def _needs(self, shard: _Shard, now: float) -> bool:
        if not shard.connections:
            return True
        newest = shard.connections[-1]
        return newest.live_since <= now and newest.tired(now)

    def _may_open(self) -> float:
        """From when on another attempt is within the venue's limit, and its patience."""
        if len(self._attempts) < MOST_ATTEMPTS:
            return self._open_at
        return max(self._open_at, self._attempts[0] + ATTEMPTS_SECONDS)

    def _begin(self, shard: _Shard, now: float) -> Connection:
        self._attempts.append(now)
        self._open_at = max(self._open_at, now + SPACING_SECONDS)
        shard.retry_at = now + self._pause(shard.tries)
        connection = Connection(
            stall_seconds=self._stall,
            # Not all of a fleet at the same moment.
            lifetime_seconds=self._lifetime * self._random.uniform(0.9, 1.0),
        )
        self._brief(shard, connection)
        shard.connections.append(connection)
        return connection

    def _brief(self, shard: _Shard, connection: Connection) -> None:
        shortest = min((self._lengths[stream] for stream in shard.streams), default=NEVER)
        connection.want(shard.streams, shard.patience * (shortest + 2 * self._stall))

    def _forget(self, shard: _Shard, connection: Connection, now: float) -> None:
        shard.connections.remove(connection)
        if now >= connection.live_since + HEALTHY_SECONDS:
            shard.tries = 0
        shard.retry_at = now + self._pause(shard.tries)
        shard.tries += 1

    def _pause(self, tries: int) -> float:
        most = min(_SHORTEST_PAUSE_SECONDS * 2.0 ** min(tries, 10), _LONGEST_PAUSE_SECONDS)
        return most * self._random.uniform(0.5, 1.0)

    def _moments(self, shard: _Shard, now: float) -> Iterator[float]:
        for connection in shard.connections:
            yield connection.wake(now)
        if self._needs(shard, now):
            yield max(shard.retry_at, self._may_open())
        if len(shard.connections) > 1:
            yield shard.connections[-1].live_since + OVERLAP_SECONDS


def _seconds(series: Series) -> float:
    length = series.timeframe.milliseconds
    return _LONGEST_MONTH_SECONDS * series.timeframe.count if length is None else length / 1000
