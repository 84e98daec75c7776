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

PACE_SECONDS = 0.35
"""Between two series of a client: with pings and pongs, Binance allows five messages a second, and
ccxt would make use of all of them."""

SPACING_SECONDS = 0.2
"""Between the beginnings of clients."""

_ASIDE_SECONDS, _LONGEST_ASIDE_SECONDS = 60.0, 3_600.0
"""Until a series is tried again whose watching was refused."""

_MOST_PATIENCE = 64.0
_LONGEST_MONTH_SECONDS = 31 * 86_400.0


@dataclass(eq=False, slots=True)
class Client:
    """An instance of ccxt's exchange, as far as the machine knows it."""

    begun: float
    tired_at: float
    heard: float
    """When anything came, if only a pong."""
    pushed: float
    """When a candle came."""
    first: float = NEVER
    """When the first one came."""
    told: float = 0.0
    """When it was last told to watch a series."""
    watched: set[Series] = field(default_factory=set)
    """All that was ever asked of it: ccxt goes on to hear what nobody wants any more."""
    watching: set[Series] = field(default_factory=set)
    aside: dict[Series, float] = field(default_factory=dict)
    """Series refused, and when they are tried again."""
    refusals: dict[Series, int] = field(default_factory=dict)


class Begin(NamedTuple):
    """Make a client."""

    client: Client


class Watch(NamedTuple):
    """Watch a series; report :meth:`Shards.refused` if that is not to be."""

    client: Client
    series: Series


class Leave(NamedTuple):
    """Watch it no more."""

    client: Client
    series: Series


class End(NamedTuple):
    """Let go of a client; nothing more is to be reported of it."""

    client: Client
    why: str
    """Empty where its work is done."""


Command: TypeAlias = Begin | Watch | Leave | End


@dataclass(eq=False, slots=True)
class _Shard:
    """Series that share a client; all of one timeframe.

    Some exchanges' classes in ccxt (Kraken's) do not tell apart what is pushed of one symbol in
    two of them.
    """

    timeframe: Timeframe
    series: set[Series] = field(default_factory=set)
    clients: list[Client] = field(default_factory=list)
    """The oldest first."""
    tries: int = 0
    """Failures since it was last healthy."""
    retry_at: float = 0.0
    patience: float = 1.0
    """Factor of the time without candles that is still held possible."""


class Shards:
    """Keeps every series watched. :attr:`wake` is when :meth:`act` has something to do again.

    After :meth:`follow`, :meth:`failed` and :meth:`refused` there may be something to do at once.
    """

    def __init__(
        self, random: Random, *, room: int, stall_seconds: float, lifetime_seconds: float
    ) -> None:
        """room: series per client, at most."""
        self.wake = 0.0
        self._random, self._room = random, room
        self._stall, self._lifetime = stall_seconds, lifetime_seconds
        self._shards: list[_Shard] = []
        self._begin_at = 0.0

    # -- in --------------------------------------------------------------------------------

    def follow(self, series: Collection[Series]) -> None:
        """Watch exactly these; those kept stay where they are."""
        wanted = set(series)
        for shard in self._shards:
            shard.series &= wanted
        new = wanted - {one for shard in self._shards for one in shard.series}
        for timeframe in dict.fromkeys(one.timeframe for one in sorted(new)):
            shards = [shard for shard in self._shards if shard.timeframe == timeframe]
            most = -(-sum(one.timeframe == timeframe for one in wanted) // self._room)
            made = [_Shard(timeframe) for _ in range(most - len(shards))]
            self._shards += made
            for one in sorted(one for one in new if one.timeframe == timeframe):
                min(shards + made, key=lambda shard: len(shard.series)).series.add(one)

    def heard(self, client: Client, now: float) -> None:
        """Anything came."""
        client.heard = now

    def pushed(self, client: Client, series: Series, now: float) -> None:
        """A candle came."""
        client.heard = client.pushed = now
        client.first = min(client.first, now)
        client.refusals.pop(series, None)

    def failed(self, client: Client, now: float, retry_after: float = 0.0) -> None:
        """It is of no more use; ``retry_after``: seconds for which the exchange wants no other."""
        self._begin_at = max(self._begin_at, now + retry_after)
        for shard in self._shards:
            if client in shard.clients:
                self._forget(shard, client, now)

    def refused(self, client: Client, series: Series, now: float, retry_after: float = 0.0) -> None:
        """A series cannot be watched, at least not now; the others go on."""
        tries = client.refusals[series] = client.refusals.get(series, 0) + 1
        pause = min(_ASIDE_SECONDS * 2.0 ** min(tries - 1, 10), _LONGEST_ASIDE_SECONDS)
        client.watching.discard(series)
        client.aside[series] = now + max(retry_after, pause * self._random.uniform(0.75, 1.25))

    # -- out -------------------------------------------------------------------------------

    def act(self, now: float) -> list[Command]:
        """What to do now. A client of which :meth:`failed` told is not among it."""
        commands: list[Command] = []
        for shard in list(self._shards):
            self._dismiss(shard, now, commands)
            if not shard.series:
                self._shards.remove(shard)
                continue
            if self._needs(shard, now) and now >= max(shard.retry_at, self._begin_at):
                commands.append(Begin(self._begin(shard, now)))
            for client in shard.clients:
                self._brief(shard, client, now, commands)
        moments = (moment for shard in self._shards for moment in self._moments(shard))
        # What was due by now is done; if it could not be, word of something else must come first.
        self.wake = min((moment for moment in moments if moment > now), default=NEVER)
        return commands

    def _dismiss(self, shard: _Shard, now: float, commands: list[Command]) -> None:
        """End what is broken, relieved, or without series."""
        for client in list(shard.clients):
            why = self._broken(shard, client, now)
            if why:
                commands.append(End(client, why))
                if now < self._silent_at(client):
                    shard.patience = min(2 * shard.patience, _MOST_PATIENCE)
                self._forget(shard, client, now)
        kept = shard.clients[-1:] if shard.series else []
        if kept and now < self._relieved_at(shard, kept[0]):
            return
        for client in shard.clients:
            if client not in kept:
                commands.append(End(client, ""))
                shard.patience = 1.0
        shard.clients = kept

    def _broken(self, shard: _Shard, client: Client, now: float) -> str:
        """Why it is of no more use; empty if it is."""
        if now >= self._silent_at(client):
            return f"silent for {self._stall:g} s"
        if now >= self._quiet_at(shard, client):
            return f"no candle for {now - client.pushed:.0f} s"
        return ""

    def _silent_at(self, client: Client) -> float:
        return client.heard + self._stall

    def _quiet_at(self, shard: _Shard, client: Client) -> float:
        """When some candle should have come by: bars of quiet markets are not pushed."""
        return client.pushed + shard.patience * (_seconds(shard.timeframe) + 2 * self._stall)

    def _tired_at(self, shard: _Shard, client: Client) -> float:
        """When another should take its place while it still works."""
        useless = len(client.watched - shard.series)
        return 0.0 if useless > self._room // 2 else client.tired_at

    def _relieved_at(self, shard: _Shard, successor: Client) -> float:
        if _untold(shard, successor):
            return NEVER
        return max(successor.first, successor.told) + OVERLAP_SECONDS

    def _needs(self, shard: _Shard, now: float) -> bool:
        if len(shard.clients) != 1:
            return not shard.clients
        (client,) = shard.clients
        return client.first <= now and now >= self._tired_at(shard, client)

    def _begin(self, shard: _Shard, now: float) -> Client:
        self._begin_at = max(self._begin_at, now + SPACING_SECONDS)
        shard.retry_at = now + self._pause(shard.tries)
        # Not all of them at the same moment.
        tired_at = now + self._lifetime * self._random.uniform(0.8, 1.0)
        client = Client(now, tired_at, heard=now, pushed=now, told=now - PACE_SECONDS)
        shard.clients.append(client)
        return client

    def _brief(self, shard: _Shard, client: Client, now: float, commands: list[Command]) -> None:
        """Have it watch what its shard is to watch."""
        client.aside = {
            one: until for one, until in client.aside.items() if until > now and one in shard.series
        }
        for one in sorted(client.watching - shard.series):
            client.watching.discard(one)
            commands.append(Leave(client, one))
        untold = _untold(shard, client)
        if untold and now >= client.told + PACE_SECONDS:
            one = min(untold)
            client.told = now
            client.watching.add(one)
            client.watched.add(one)
            commands.append(Watch(client, one))

    def _forget(self, shard: _Shard, client: Client, now: float) -> None:
        shard.clients.remove(client)
        if now >= client.first + HEALTHY_SECONDS:
            shard.tries = 0
        shard.retry_at = now + self._pause(shard.tries)
        shard.tries += 1

    def _pause(self, tries: int) -> float:
        most = min(_SHORTEST_PAUSE_SECONDS * 2.0 ** min(tries, 10), _LONGEST_PAUSE_SECONDS)
        return most * self._random.uniform(0.5, 1.0)

    def _moments(self, shard: _Shard) -> Iterator[float]:
        for client in shard.clients:
            yield self._silent_at(client)
            yield self._quiet_at(shard, client)
            yield from client.aside.values()
            if _untold(shard, client):
                yield client.told + PACE_SECONDS
        if len(shard.clients) > 1:
            yield self._relieved_at(shard, shard.clients[-1])
        else:
            tired_at = max((self._tired_at(shard, one) for one in shard.clients), default=0.0)
            yield max(tired_at, shard.retry_at, self._begin_at)


def _untold(shard: _Shard, client: Client) -> set[Series]:
    """What the client is still to be told to watch."""
    return shard.series - client.watching - client.aside.keys()


def _seconds(timeframe: Timeframe) -> float:
    length = timeframe.milliseconds
    return _LONGEST_MONTH_SECONDS * timeframe.count if length is None else length / 1000
