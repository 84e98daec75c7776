"""One websocket's life as a pure machine: what it is told and the time in, requests out.

Times are seconds of any clock that never goes back.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

import orjson

from kronos_connectors.binance.frames import Answer

PER_REQUEST = 150
"""Streams per SUBSCRIBE: messages stay small."""

PACE_SECONDS = 0.35
"""Between requests: with pongs at most four messages a second reach the venue, of five allowed."""

ANSWER_SECONDS = 5.0
"""Deadline of the answer to a request."""

NEVER = float("inf")


class Connection:
    """Subscribes to the streams wanted within the venue's rules, and knows when it is of no use.

    A server that says nothing for ``stall_seconds`` is asked for something: an answer proves it
    alive where markets are merely quiet. At the age of ``lifetime_seconds`` it is tired.
    """

    def __init__(self, *, stall_seconds: float, lifetime_seconds: float) -> None:
        self.opened = NEVER
        """When the handshake succeeded."""
        self.live_since = NEVER
        """Since when all that was wanted first has been granted."""
        self._stall, self._lifetime = stall_seconds, lifetime_seconds
        self._quiet = NEVER
        self._heard = self._kline = NEVER
        self._wanted: frozenset[str] = frozenset()
        self._asked: set[str] = set()
        self._waiting: dict[int, float] = {}
        self._next_request = 0.0
        self._number = 0
        self._trouble = ""
        self._retiring = False

    # -- in --------------------------------------------------------------------------------

    def open(self, now: float) -> None:
        """The handshake has succeeded."""
        self.opened = self._heard = self._next_request = now

    def want(self, streams: Collection[str], quiet_seconds: float) -> None:
        """Follow exactly these, of which a kline is to come every ``quiet_seconds``."""
        self._wanted, self._quiet = frozenset(streams), quiet_seconds

    def heard(self, now: float) -> None:
        """Some frame came."""
        self._heard = now

    def kline(self, now: float) -> None:
        """A kline came."""
        self._heard = self._kline = now

    def answer(self, answer: Answer, now: float) -> None:
        """The venue answers a request."""
        known = answer.id is not None and self._waiting.pop(answer.id, None) is not None
        if answer.error:
            self._trouble = f"request refused: {answer.error}"
        elif known and self.live_since == NEVER and self.granted:
            self.live_since = self._kline = now

    def retire(self) -> None:
        """The server says that it will go away."""
        self._retiring = True

    # -- out -------------------------------------------------------------------------------

    @property
    def granted(self) -> bool:
        """Whether all that is wanted now was asked for and granted."""
        return not self._waiting and self._asked == self._wanted

    def request(self, now: float) -> bytes | None:
        """The message to send now, if one is due."""
        if self.opened == NEVER or now < self._next_request:
            return None
        for method, streams in (
            ("UNSUBSCRIBE", self._asked - self._wanted),  # first: there may be no room
            ("SUBSCRIBE", self._wanted - self._asked),
        ):
            if streams:
                part = list(islice(sorted(streams), PER_REQUEST))
                self._asked.symmetric_difference_update(part)
                return self._say(now, {"method": method, "params": part})
        if now >= self._heard + self._stall and not self._waiting:
            return self._say(now, {"method": "LIST_SUBSCRIPTIONS"})
        return None

    def _say(self, now: float, request: dict[str, object]) -> bytes:
        self._number += 1
        self._waiting[self._number] = now + ANSWER_SECONDS
        self._next_request = now + PACE_SECONDS
        return orjson.dumps({**request, "id": self._number})

    def broken(self, now: float) -> str:
        """Why it is of no more use; empty if it is."""
        if self._trouble:
            return self._trouble
        if any(until <= now for until in self._waiting.values()):
            return f"no answer within {ANSWER_SECONDS:g} s"
        return f"no kline for {self._quiet:g} s" if self.quiet(now) else ""

    def quiet(self, now: float) -> bool:
        """Whether no kline came although some should have."""
        return now >= self._kline + self._quiet

    def tired(self, now: float) -> bool:
        """Whether another should take its place while it still works."""
        return self._retiring or now >= self.opened + self._lifetime

    def wake(self, now: float) -> float:
        """When :meth:`request`, :meth:`broken` or :meth:`tired` may next say something new."""
        if self.opened == NEVER:
            return NEVER
        moments = [self.opened + self._lifetime, self._kline + self._quiet, self._next_request]
        moments += self._waiting.values()
        if not self._waiting:
            moments.append(self._heard + self._stall)
        return min((moment for moment in moments if moment > now), default=NEVER)
