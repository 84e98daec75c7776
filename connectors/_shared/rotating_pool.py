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
    """When it first delivered what it was opened for; NEVER before."""


MemberT = TypeVar("MemberT", bound=Member)
KeyT = TypeVar("KeyT", bound=Any)
"""Subscription; sortable."""
RequestT = TypeVar("RequestT")


class Open(NamedTuple, Generic[MemberT]):
    """Open a connection, and report if it is lost."""

    member: MemberT


class Close(NamedTuple, Generic[MemberT]):
    """Close a connection; report nothing more about it."""

    member: MemberT
    reason: str
    """Why it failed; empty where it was replaced or has no subscriptions left."""


@dataclass(eq=False, slots=True)
class Shard(Generic[MemberT, KeyT]):
    """Subscriptions that share a connection."""

    group: Any
    """What :meth:`RotatingPool._group` returns for all its subscriptions."""
    backoff: Backoff
    subscriptions: set[KeyT] = field(default_factory=set)
    members: list[MemberT] = field(default_factory=list)
    """Oldest first; the newest may still be opening."""
    retry_at: float = 0.0
    candle_timeout_factor: float = 1.0
    """Doubles with every member closed for lack of candles: the market may just be quiet."""


class RotatingPool(ABC, Generic[MemberT, KeyT, RequestT]):
    """Keeps every subscription on a working connection; a subclass knows the connections.

    Call :meth:`poll` at :attr:`next_wakeup`, and after every event other than a candle.
    """

    open_interval_seconds: float
    """Between two attempts to open."""
    min_lifetime_factor: float
    """Lower bound of the random factor of a member's lifetime, so that not all expire at once."""
    max_members: float = NEVER
    """Members of a shard during a handover."""

    def __init__(
        self, random: Random, *, capacity: int, stall_seconds: float, lifetime_seconds: float
    ) -> None:
        """capacity: most subscriptions of a member."""
        self.next_wakeup = 0.0
        self._random, self._capacity = random, capacity
        self._stall, self._lifetime = stall_seconds, lifetime_seconds
        self._shards: list[Shard[MemberT, KeyT]] = []
        self._next_open_at = 0.0

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
                commands += self._requests(shard, member, now)
        deadlines = (deadline for shard in self._shards for deadline in self._deadlines(shard, now))
        # Everything due has run; anything blocked waits for another event.
        self.next_wakeup = min(
            (deadline for deadline in deadlines if deadline > now), default=NEVER
        )
        return commands

    def _distribute(self, wanted: AbstractSet[KeyT]) -> None:
        """Spread new subscriptions evenly over as few shards as hold them; others stay in place."""
        for shard in self._shards:
            shard.subscriptions &= wanted
        new = sorted(wanted - {key for shard in self._shards for key in shard.subscriptions})
        for group in dict.fromkeys(map(self._group, new)):
            shards = [shard for shard in self._shards if shard.group == group]
            needed = -(-sum(self._group(key) == group for key in wanted) // self._capacity)
            added = [self._new_shard(group) for _ in range(needed - len(shards))]
            self._shards += added
            for key in new:
                if self._group(key) == group:
                    shard = min(shards + added, key=lambda shard: len(shard.subscriptions))
                    shard.subscriptions.add(key)

    def _new_shard(self, group: object) -> Shard[MemberT, KeyT]:
        backoff = Backoff(self._random, initial=_MIN_BACKOFF_SECONDS, maximum=_MAX_BACKOFF_SECONDS)
        return Shard(group, backoff)

    def _reap(self, shard: Shard[MemberT, KeyT], now: float) -> Iterator[Close[MemberT]]:
        """Close members that failed, were replaced, or have no subscriptions."""
        for member in list(shard.members):
            if reason := self._failure(shard, member, now):
                if self._candles_missing(shard, member, now):
                    doubled = 2 * shard.candle_timeout_factor
                    shard.candle_timeout_factor = min(doubled, _MAX_TIMEOUT_FACTOR)
                self._remove(shard, member, now)
                yield Close(member, reason)
        kept = shard.members[-1:] if shard.subscriptions else []
        if kept and now < self._handover_at(shard, kept[0]):
            return
        closed = shard.members[: len(shard.members) - len(kept)]
        shard.members = kept
        for member in closed:
            shard.candle_timeout_factor = 1.0
            yield Close(member, "")

    def _needs_member(self, shard: Shard[MemberT, KeyT], now: float) -> bool:
        if not shard.members:
            return True
        newest = shard.members[-1]
        return (
            len(shard.members) < self.max_members
            and newest.live_since <= now
            and self._expired(shard, newest, now)
        )

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

    def _open_at(self, shard: Shard[MemberT, KeyT]) -> float:
        return max(shard.retry_at, self._next_open_at)

    def _deadlines(self, shard: Shard[MemberT, KeyT], now: float) -> Iterator[float]:
        for member in shard.members:
            yield from self._member_deadlines(shard, member, now)
        if self._needs_member(shard, now):
            yield self._open_at(shard)
        if len(shard.members) > 1:
            yield self._handover_at(shard, shard.members[-1])

    def _candle_timeout(self, shard: Shard[MemberT, KeyT], bar_seconds: float) -> float:
        """Seconds without a candle after which a member is closed."""
        return shard.candle_timeout_factor * (bar_seconds + 2 * self._stall)

    def _group(self, key: KeyT) -> object:  # noqa: ARG002
        """Subscriptions of different groups, hashable values, never share a member."""
        return None

    @abstractmethod
    def _create(self, shard: Shard[MemberT, KeyT], now: float, lifetime: float) -> MemberT:
        """Create a member to be opened now and replaced after ``lifetime`` seconds."""

    @abstractmethod
    def _requests(
        self, shard: Shard[MemberT, KeyT], member: MemberT, now: float
    ) -> Iterable[RequestT]:
        """Commands that give the member the subscriptions of its shard."""

    @abstractmethod
    def _failure(self, shard: Shard[MemberT, KeyT], member: MemberT, now: float) -> str:
        """Why the member must be closed; empty while it works."""

    @abstractmethod
    def _candles_missing(self, shard: Shard[MemberT, KeyT], member: MemberT, now: float) -> bool:
        """Whether a failed member may have failed just because its markets are quiet."""

    @abstractmethod
    def _expired(self, shard: Shard[MemberT, KeyT], member: MemberT, now: float) -> bool:
        """Whether a working member is to be replaced."""

    @abstractmethod
    def _handover_at(self, shard: Shard[MemberT, KeyT], successor: MemberT) -> float:
        """When ``successor`` has served long enough for the older members to be closed."""

    @abstractmethod
    def _member_deadlines(
        self, shard: Shard[MemberT, KeyT], member: MemberT, now: float
    ) -> Iterable[float]:
        """Times at which the member may fail, expire or have a request to send."""


def longest_bar_seconds(timeframe: Timeframe) -> float:
    """Length of a bar in seconds; months have 31 days."""
    length = timeframe.milliseconds
    return _LONGEST_MONTH_SECONDS * timeframe.count if length is None else length / 1000
