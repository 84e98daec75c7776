"""All clients that watch an exchange, as a pure machine: which to begin, for what, and to end.

The series are spread over shards. A shard has one client, an instance of ccxt's exchange with
sockets of its own, or two while a new one takes over. Whatever goes wrong with a client, another
takes its place: nothing is mended inside ccxt. Times are seconds of any clock that never goes back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple, TypeAlias

from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

NEVER = float("inf")

_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0

HEALTHY_SECONDS = 15.0
"""A client that has lived so long is no failure when it ends."""

OVERLAP_SECONDS = 30.0
"""How long an old client goes on once its successor is heard, and was told of all its series."""

REQUEST_INTERVAL_SECONDS = 0.35
"""Between two series of a client: with pings and pongs, Binance allows five messages a second, and
ccxt would make use of all of them."""

OPEN_INTERVAL_SECONDS = 0.2
"""Between the beginnings of clients."""

_REFUSAL_PAUSE_SECONDS, _LONGEST_REFUSAL_PAUSE_SECONDS = 60.0, 3_600.0
"""Until a series is tried again whose watching was refused."""

_MAX_TIMEOUT_FACTOR = 64.0
_LONGEST_MONTH_SECONDS = 31 * 86_400.0


@dataclass(eq=False, slots=True)
class Client:
    """An instance of ccxt's exchange, as far as the machine knows it."""

    opened_at: float
    expires_at: float
    last_activity: float
    """When anything came, if only a pong."""
    last_candle: float
    """When a candle came."""
    live_since: float = NEVER
    """When the first one came."""
    last_request_at: float = 0.0
    """When it was last told to watch a series."""
    ever_requested: set[Series] = field(default_factory=set)
    """All that was ever asked of it: ccxt goes on to hear what nobody wants any more."""
    requested: set[Series] = field(default_factory=set)
    refused_until: dict[Series, float] = field(default_factory=dict)
    """Series refused, and when they are tried again."""
    refusals: dict[Series, int] = field(default_factory=dict)


class Open(NamedTuple):
    """Make a client."""

    member: Client


class Watch(NamedTuple):
    """Watch a series; report :meth:`Shards.refused` if that is not to be."""

    member: Client
    series: Series


class Unwatch(NamedTuple):
    """Watch it no more."""

    member: Client
    series: Series


class Close(NamedTuple):
    """Let go of a client; nothing more is to be reported of it."""

    member: Client
    reason: str
    """Empty where its work is done."""


Command: TypeAlias = Open | Watch | Unwatch | Close


@dataclass(eq=False, slots=True)
class _Shard:
    """Series that share a client; all of one timeframe.

    Some exchanges' classes in ccxt (Kraken's) do not tell apart what is pushed of one symbol in
    two of them.
    """

    timeframe: Timeframe
    streams: set[Series] = field(default_factory=set)
    members: list[Client] = field(default_factory=list)
    """The oldest first."""
    failures: int = 0
    """Failures since it was last healthy."""
    retry_at: float = 0.0
    candle_timeout_factor: float = 1.0
    """Factor of the time without candles that is still held possible."""


class ClientPool:
    """Keeps every series watched. :attr:`wake` is when :meth:`act` has something to do again.

    After :meth:`follow`, :meth:`failed` and :meth:`refused` there may be something to do at once.
    """

    def __init__(
        self, random: Random, *, capacity: int, stall_seconds: float, lifetime_seconds: float
    ) -> None:
        """room: series per client, at most."""
        self.next_wakeup = 0.0
        self._random, self._capacity = random, capacity
        self._stall, self._lifetime = stall_seconds, lifetime_seconds
        self._shards: list[_Shard] = []
        self._next_open_at = 0.0

    # -- in --------------------------------------------------------------------------------

    def follow(self, series: Collection[Series]) -> None:
        """Watch exactly these; those kept stay where they are."""
        wanted = set(series)
        for shard in self._shards:
            shard.streams &= wanted
        new = wanted - {one for shard in self._shards for one in shard.streams}
        for timeframe in dict.fromkeys(one.timeframe for one in sorted(new)):
            shards = [shard for shard in self._shards if shard.timeframe == timeframe]
            most = -(-sum(one.timeframe == timeframe for one in wanted) // self._capacity)
            made = [_Shard(timeframe) for _ in range(most - len(shards))]
            self._shards += made
            for one in sorted(one for one in new if one.timeframe == timeframe):
                min(shards + made, key=lambda shard: len(shard.streams)).streams.add(one)

    def on_activity(self, client: Client, now: float) -> None:
        """Anything came."""
        client.last_activity = now

    def on_candle(self, client: Client, series: Series, now: float) -> None:
        """A candle came."""
        client.last_activity = client.last_candle = now
        client.live_since = min(client.live_since, now)
        client.refusals.pop(series, None)

    def on_lost(self, client: Client, now: float, retry_after: float = 0.0) -> None:
        """It is of no more use; ``retry_after``: seconds for which the exchange wants no other."""
        self._next_open_at = max(self._next_open_at, now + retry_after)
        for shard in self._shards:
            if client in shard.members:
                self._remove(shard, client, now)

    def on_refused(
        self, client: Client, series: Series, now: float, retry_after: float = 0.0
    ) -> None:
        """A series cannot be watched, at least not now; the others go on."""
        tries = client.refusals[series] = client.refusals.get(series, 0) + 1
        pause = min(
            _REFUSAL_PAUSE_SECONDS * 2.0 ** min(tries - 1, 10), _LONGEST_REFUSAL_PAUSE_SECONDS
        )
        client.requested.discard(series)
        client.refused_until[series] = now + max(
            retry_after, pause * self._random.uniform(0.75, 1.25)
        )

    # -- out -------------------------------------------------------------------------------

    def poll(self, now: float) -> list[Command]:
        """What to do now. A client of which :meth:`failed` told is not among it."""
        commands: list[Command] = []
        for shard in list(self._shards):
            self._reap(shard, now, commands)
            if not shard.streams:
                self._shards.remove(shard)
                continue
            if self._needs_member(shard, now) and now >= max(shard.retry_at, self._next_open_at):
                commands.append(Open(self._open(shard, now)))
            for client in shard.members:
                self._assign(shard, client, now, commands)
        moments = (moment for shard in self._shards for moment in self._deadlines(shard))
        # What was due by now is done; if it could not be, word of something else must come first.
        self.next_wakeup = min((moment for moment in moments if moment > now), default=NEVER)
        return commands

    def _reap(self, shard: _Shard, now: float, commands: list[Command]) -> None:
        """End what is broken, relieved, or without series."""
        for client in list(shard.members):
            why = self._failure(shard, client, now)
            if why:
                commands.append(Close(client, why))
                if now < self._stalled_at(client):
                    shard.candle_timeout_factor = min(
                        2 * shard.candle_timeout_factor, _MAX_TIMEOUT_FACTOR
                    )
                self._remove(shard, client, now)
        kept = shard.members[-1:] if shard.streams else []
        if kept and now < self._handover_at(shard, kept[0]):
            return
        for client in shard.members:
            if client not in kept:
                commands.append(Close(client, ""))
                shard.candle_timeout_factor = 1.0
        shard.members = kept

    def _failure(self, shard: _Shard, client: Client, now: float) -> str:
        """Why it is of no more use; empty if it is."""
        if now >= self._stalled_at(client):
            return f"silent for {self._stall:g} s"
        if now >= self._candle_overdue_at(shard, client):
            return f"no candle for {now - client.last_candle:.0f} s"
        return ""

    def _stalled_at(self, client: Client) -> float:
        return client.last_activity + self._stall

    def _candle_overdue_at(self, shard: _Shard, client: Client) -> float:
        """When some candle should have come by: bars of quiet markets are not pushed."""
        return client.last_candle + shard.candle_timeout_factor * (
            _timeframe_seconds(shard.timeframe) + 2 * self._stall
        )

    def _expires_at(self, shard: _Shard, client: Client) -> float:
        """When another should take its place while it still works."""
        useless = len(client.ever_requested - shard.streams)
        return 0.0 if useless > self._capacity // 2 else client.expires_at

    def _handover_at(self, shard: _Shard, successor: Client) -> float:
        if _unrequested(shard, successor):
            return NEVER
        return max(successor.live_since, successor.last_request_at) + OVERLAP_SECONDS

    def _needs_member(self, shard: _Shard, now: float) -> bool:
        if len(shard.members) != 1:
            return not shard.members
        (client,) = shard.members
        return client.live_since <= now and now >= self._expires_at(shard, client)

    def _open(self, shard: _Shard, now: float) -> Client:
        self._next_open_at = max(self._next_open_at, now + OPEN_INTERVAL_SECONDS)
        shard.retry_at = now + self._backoff(shard.failures)
        # Not all of them at the same moment.
        tired_at = now + self._lifetime * self._random.uniform(0.8, 1.0)
        client = Client(
            now,
            tired_at,
            last_activity=now,
            last_candle=now,
            last_request_at=now - REQUEST_INTERVAL_SECONDS,
        )
        shard.members.append(client)
        return client

    def _assign(self, shard: _Shard, client: Client, now: float, commands: list[Command]) -> None:
        """Have it watch what its shard is to watch."""
        client.refused_until = {
            one: until
            for one, until in client.refused_until.items()
            if until > now and one in shard.streams
        }
        for one in sorted(client.requested - shard.streams):
            client.requested.discard(one)
            commands.append(Unwatch(client, one))
        untold = _unrequested(shard, client)
        if untold and now >= client.last_request_at + REQUEST_INTERVAL_SECONDS:
            one = min(untold)
            client.last_request_at = now
            client.requested.add(one)
            client.ever_requested.add(one)
            commands.append(Watch(client, one))

    def _remove(self, shard: _Shard, client: Client, now: float) -> None:
        shard.members.remove(client)
        if now >= client.live_since + HEALTHY_SECONDS:
            shard.failures = 0
        shard.retry_at = now + self._backoff(shard.failures)
        shard.failures += 1

    def _backoff(self, tries: int) -> float:
        most = min(_SHORTEST_PAUSE_SECONDS * 2.0 ** min(tries, 10), _LONGEST_PAUSE_SECONDS)
        return most * self._random.uniform(0.5, 1.0)

    def _deadlines(self, shard: _Shard) -> Iterator[float]:
        for client in shard.members:
            yield self._stalled_at(client)
            yield self._candle_overdue_at(shard, client)
            yield from client.refused_until.values()
            if _unrequested(shard, client):
                yield client.last_request_at + REQUEST_INTERVAL_SECONDS
        if len(shard.members) > 1:
            yield self._handover_at(shard, shard.members[-1])
        else:
            tired_at = max((self._expires_at(shard, one) for one in shard.members), default=0.0)
            yield max(tired_at, shard.retry_at, self._next_open_at)


def _unrequested(shard: _Shard, client: Client) -> set[Series]:
    """What the client is still to be told to watch."""
    return shard.streams - client.requested - client.refused_until.keys()


def _timeframe_seconds(timeframe: Timeframe) -> float:
    length = timeframe.milliseconds
    return _LONGEST_MONTH_SECONDS * timeframe.count if length is None else length / 1000
