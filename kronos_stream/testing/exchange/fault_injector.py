"""Drawing of faults, and a record of those that happened.

Every decision is a function of the seed and its subject (a bar, a request at a time, the n-th
connection), never of earlier decisions. So the order of requests does not matter, and switching
off one kind does not shift the others.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from hashlib import blake2b
from random import Random
from typing import NamedTuple

from kronos_stream.market.clock import Clock
from kronos_stream.testing.exchange.faults import PER_BAR, PER_REQUEST, Faults

_HOUR = 3_600.0
_MAX_INCIDENTS = 10_000


class Incident(NamedTuple):
    """A fault that happened: time (UTC ms by the exchange's clock), kind and subject."""

    moment: int
    kind: str
    subject: str


class SkewedClock:
    """A clock with skew and drift against another."""

    def __init__(self, clock: Clock, skew_seconds: float, drift_ppm: float) -> None:
        self._clock, self._skew, self._drift = clock, round(skew_seconds * 1000), drift_ppm / 1e6
        self._started = clock.now()

    def now(self) -> int:
        now = self._clock.now()
        return now + self._skew + int((now - self._started) * self._drift)

    async def sleep(self, seconds: float) -> None:
        await self._clock.sleep(seconds)

    async def sleep_until(self, moment: int) -> None:
        await self._clock.sleep(0)
        while (left := moment - self.now()) > 0:
            await self._clock.sleep(max(left / (1 + self._drift), 1.0) / 1000)


class FaultInjector:
    """Draws faults, and counts those that happened."""

    def __init__(self, faults: Faults, start: int) -> None:
        self.faults, self.start = faults, start
        self.counts: Counter[str] = Counter()
        self.incidents: deque[Incident] = deque(maxlen=_MAX_INCIDENTS)
        self._affects_bars = faults.affect_bars
        self._ends_at = start + faults.until_seconds * 1000

    def record(self, kind: str, subject: str, moment: int) -> None:
        self.counts[kind] += 1
        self.incidents.append(Incident(moment, kind, subject))

    def random_for(self, *key: object) -> Random:
        """Random numbers that depend on the seed and ``key`` alone."""
        return Random(self._hash(key))

    def _hash(self, key: tuple[object, ...], size: int = 8) -> bytes:
        text = "\0".join(map(str, (self.faults.seed, *key)))
        return blake2b(text.encode(), digest_size=size).digest()

    def has_ended(self, now: int) -> bool:
        """Return whether all faults have ended at ``now``."""
        return now >= self._ends_at

    # -- bars ------------------------------------------------------------------------------

    def bar_faults(self, symbol: str, interval: str, opened: int, closes: int) -> dict[str, float]:
        """Faults of a bar, each with a size between 0.5 and 1.5; usually none."""
        if not self._affects_bars or self.has_ended(closes):
            return {}
        digest = self._hash((symbol, interval, opened), 8 * len(PER_BAR))
        drawn = {}
        for i, kind in enumerate(PER_BAR):
            chance = int.from_bytes(digest[8 * i : 8 * i + 4], "big") / 2**32
            size = 0.5 + int.from_bytes(digest[8 * i + 4 : 8 * i + 8], "big") / 2**32
            if chance < getattr(self.faults, kind):
                drawn[kind] = size
        for planned in self.faults.plan:
            since = closes - self.start - planned.at * 1000
            window = max(planned.seconds * 1000, closes - opened)
            if planned.kind in PER_BAR and planned.symbol in {"", symbol} and 0 <= since < window:
                drawn.setdefault(planned.kind, 1.0)
        return drawn

    def is_lost(self, symbol: str, interval: str, opened: int, closes: int) -> bool:
        """Return whether the venue never has this bar."""
        return self._affects_bars and "lost" in self.bar_faults(symbol, interval, opened, closes)

    # -- periods ---------------------------------------------------------------------------

    def is_silent(self, symbol: str, now: int) -> bool:
        """Return whether ``symbol`` is silent at ``now``."""
        return self._fault_end("silence", symbol, now, self.faults.silence_seconds) is not None

    def refusal(self, now: int) -> tuple[str, int] | None:
        """Refusal of all REST requests at ``now``: "limited" or "banned", and its end."""
        for kind, seconds in (
            ("banned", self.faults.banned_seconds),
            ("limited", self.faults.limited_seconds),
        ):
            until = self._fault_end(kind, "", now, seconds)
            if until is not None:
                return kind, until
        return None

    def _fault_end(self, kind: str, subject: str, now: int, seconds: float) -> int | None:
        """End (UTC ms) of the period of ``kind`` at ``now``, if there is one."""
        if self.has_ended(now):
            return None
        for planned in self.faults.plan:
            begins = self.start + round(planned.at * 1000)
            ends = begins + round((planned.seconds or seconds) * 1000)
            if planned.kind == kind and planned.symbol in {"", subject} and begins <= now < ends:
                return ends
        rate = getattr(self.faults, kind)
        if not rate:
            return None
        length = round(seconds * 1000)
        period = (now - self.start) // length
        if self.random_for(kind, subject, period).random() >= rate * seconds / _HOUR:
            return None
        return self.start + (period + 1) * length

    # -- connections and requests ------------------------------------------------------------

    def fault_times(self, kind: str, *about: object) -> Iterator[float]:
        """Times of faults of ``kind``, in seconds, at its rate; endless, or none at all."""
        rate = getattr(self.faults, kind)
        random, moment = self.random_for(kind, *about), 0.0
        while rate:
            moment += random.expovariate(rate / _HOUR)
            yield moment

    def handshake_fault(self, number: int, now: int) -> Random | None:
        """Random numbers to choose a fault, if the handshake of connection ``number`` fails."""
        if self.has_ended(now):
            return None
        random = self.random_for("handshake", number)
        fails = random.random() < self.faults.handshake
        return random if fails or self._is_planned("handshake", now) else None

    def request_fault(self, request: str, now: int) -> tuple[str, Random]:
        """Fault of a REST request at ``now``, empty for none, and random numbers to size it."""
        random = self.random_for("request", request, now)
        if self.has_ended(now):
            return "", random
        for kind in PER_REQUEST:
            rate = getattr(self.faults, kind)
            if self._is_planned(kind, now) or (
                rate and self.random_for(kind, request, now).random() < rate
            ):
                return kind, random
        return "", random

    def _is_planned(self, kind: str, now: int) -> bool:
        since = (now - self.start) / 1000
        return any(
            planned.kind == kind and planned.at <= since <= planned.at + planned.seconds
            for planned in self.faults.plan
        )
