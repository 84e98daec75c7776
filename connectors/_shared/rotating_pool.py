"""Pool of connections that are replaced without a gap, as a pure state machine.

Subscriptions are spread over shards. A shard has one member, a connection, or two during a
handover: the old one is closed only when the new one has every subscription, so no update is
missed and some arrive twice. A member that fails is replaced, never repaired. Times are seconds of
any monotonic clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from random import Random
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from kronos_stream.backoff import Backoff
from kronos_stream.market.timeframe import Timeframe

NEVER = float("inf")

HEALTHY_SECONDS = 15.0
"""A member that was live for this long resets the backoff of its shard."""

_MIN_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 0.5, 30.0
_MAX_TIMEOUT_FACTOR = 64.0
_LONGEST_MONTH_SECONDS = 31 * 86_400.0


class Member(Protocol):
    """Connection of a shard."""

    live_since: float
    """Time of its first delivery; NEVER before that."""

    @property
    def complete_since(self) -> float:
        """Time since which it is live with every subscription of its shard; NEVER before that."""

    def requests(self, now: float) -> Iterable[Any]:
        """Commands that update its subscriptions."""

    def failure(self, now: float) -> str:
        """Reason to close it; empty while it works."""

    def candle_overdue(self, now: float) -> bool:
        """Return whether it may have failed only because its markets are quiet."""

    def expired(self, now: float) -> bool:
        """Return whether it is to be replaced although it works."""

    def next_wakeup(self, now: float) -> float:
        """Time after ``now`` at which the other methods' results may next change by themselves."""


MemberT = TypeVar("MemberT", bound=Member)
KeyT = TypeVar("KeyT", bound=Any)
"""Subscription; sortable."""
RequestT = TypeVar("RequestT")


class Open(NamedTuple, Generic[MemberT]):
    """Open a connection; report :meth:`RotatingPool.on_lost` when it ends."""

    member: MemberT


class Close(NamedTuple, Generic[MemberT]):
    """Close a connection; report nothing more about it."""

    member: MemberT
    reason: str
    """Why it failed; empty if it was replaced or has no subscriptions left."""


@dataclass(eq=False, slots=True)
class Shard(Generic[MemberT, KeyT]):
    """Subscriptions that share a connection."""

    group: object
    backoff: Backoff
    subscriptions: set[KeyT] = field(default_factory=set)
    members: list[MemberT] = field(default_factory=list)
    """Oldest first; the newest may still be opening."""
    retry_at: float = 0.0
    timeout_factor: float = 1.0
    """Doubles with every member that was closed for lack of candles."""

    def candle_timeout(self, timeframe: Timeframe, stall_seconds: float) -> float:
        """Seconds without a candle after which a member fails."""
        length = timeframe.milliseconds
        bar = _LONGEST_MONTH_SECONDS * timeframe.count if length is None else length / 1000
        return self.timeout_factor * (bar + 2 * stall_seconds)


class RotatingPool(ABC, Generic[MemberT, KeyT, RequestT]):
    """Keeps every subscription on a working connection.

    Call :meth:`poll` at :attr:`next_wakeup`, and after every event other than a candle.
    """

    open_interval_seconds: float
    """Between two attempts to open."""
    overlap_seconds: float
    """Time that older members stay open beside a complete successor."""
    min_lifetime_factor: float
    """Lower bound of the random factor of lifetimes, so that not all members expire at once."""
    max_members: float = NEVER
    """Most members of a shard."""

    def __init__(
        self, random: Random, *, capacity: int, stall_seconds: float, lifetime_seconds: float
    ) -> None:
        """capacity: most subscriptions of a member."""
        self.next_wakeup = 0.0
        self._random, self._capacity = random, capacity
        self._stall, self._lifetime = stall_seconds, lifetime_seconds
        self._shards: list[Shard[MemberT, KeyT]] = []
        self._next_open_at = 0.0

    @abstractmethod
    def _create(self, shard: Shard[MemberT, KeyT], now: float, lifetime: float) -> MemberT:
        """Create a member that is opened now and expires after ``lifetime`` seconds."""

    def _group(self, key: KeyT) -> object:  # noqa: ARG002
        """Subscriptions of different groups, hashable values, never share a member."""
        return None

    def on_lost(self, member: MemberT, now: float, retry_after: float = 0.0) -> None:
        """Remove a member that ended or was never opened.

        retry_after: seconds for which the venue wants no new connection.
        """
        self._next_open_at = max(self._next_open_at, now + retry_after)
        for shard in self._shards:
            if member in shard.members:
                self._remove(shard, member, now)

    def poll(self, now: float) -> list[Open[MemberT] | Close[MemberT] | RequestT]:
        """Commands to execute now."""
        commands: list[Open[MemberT] | Close[MemberT] | RequestT] = []
        for shard in list(self._shards):
            commands += self._reap(shard, now)
            if not shard.subscriptions:
                self._shards.remove(shard)
                continue
            if self._needs_member(shard, now) and now >= self._open_at(shard):
                commands.append(Open(self._open(shard, now)))
            for member in shard.members:
                commands += member.requests(now)
        deadlines = (time for shard in self._shards for time in self._deadlines(shard, now))
        # Everything due has run; anything blocked waits for another event.
        self.next_wakeup = min((time for time in deadlines if time > now), default=NEVER)
        return commands

    def _distribute(self, wanted: AbstractSet[KeyT]) -> None:
        """Spread new subscriptions evenly over as few shards as hold them; others stay in place."""
        for shard in self._shards:
            shard.subscriptions &= wanted
        new = sorted(wanted - {key for shard in self._shards for key in shard.subscriptions})
        for group in dict.fromkeys(map(self._group, new)):
            shards = [shard for shard in self._shards if shard.group == group]
            needed = -(-sum(self._group(key) == group for key in wanted) // self._capacity)
            while len(shards) < needed:
                shards.append(Shard(group, self._backoff()))
                self._shards.append(shards[-1])
            for key in new:
                if self._group(key) == group:
                    smallest = min(shards, key=lambda shard: len(shard.subscriptions))
                    smallest.subscriptions.add(key)

    def _backoff(self) -> Backoff:
        return Backoff(self._random, initial=_MIN_BACKOFF_SECONDS, maximum=_MAX_BACKOFF_SECONDS)

    def _reap(self, shard: Shard[MemberT, KeyT], now: float) -> Iterator[Close[MemberT]]:
        """Close members that failed, were replaced, or have no subscriptions."""
        for member in list(shard.members):
            if reason := member.failure(now):
                if member.candle_overdue(now):
                    shard.timeout_factor = min(2 * shard.timeout_factor, _MAX_TIMEOUT_FACTOR)
                self._remove(shard, member, now)
                yield Close(member, reason)
        if shard.subscriptions and now < self._handover_at(shard):
            return
        kept = 1 if shard.subscriptions else 0
        while len(shard.members) > kept:
            shard.timeout_factor = 1.0
            yield Close(shard.members.pop(0), "")

    def _handover_at(self, shard: Shard[MemberT, KeyT]) -> float:
        return shard.members[-1].complete_since + self.overlap_seconds if shard.members else NEVER

    def _needs_member(self, shard: Shard[MemberT, KeyT], now: float) -> bool:
        if not shard.members:
            return True
        newest = shard.members[-1]
        may_add = len(shard.members) < self.max_members
        return may_add and newest.live_since <= now and newest.expired(now)

    def _open_at(self, shard: Shard[MemberT, KeyT]) -> float:
        """Earliest time of the next attempt to open a member."""
        return max(shard.retry_at, self._next_open_at)

    def _open(self, shard: Shard[MemberT, KeyT], now: float) -> MemberT:
        self._next_open_at = max(self._next_open_at, now + self.open_interval_seconds)
        shard.retry_at = now + shard.backoff.current_delay()
        lifetime = self._lifetime * self._random.uniform(self.min_lifetime_factor, 1.0)
        member = self._create(shard, now, lifetime)
        shard.members.append(member)
        return member

    def _remove(self, shard: Shard[MemberT, KeyT], member: MemberT, now: float) -> None:
        shard.members.remove(member)
        if now >= member.live_since + HEALTHY_SECONDS:
            shard.backoff.reset()
        shard.retry_at = now + shard.backoff.next_delay()

    def _deadlines(self, shard: Shard[MemberT, KeyT], now: float) -> Iterator[float]:
        yield from (member.next_wakeup(now) for member in shard.members)
        if self._needs_member(shard, now):
            yield self._open_at(shard)
        if len(shard.members) > 1:
            yield self._handover_at(shard)
