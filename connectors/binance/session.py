"""One websocket connection as a pure machine: frames and time in, requests and verdicts out."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

import orjson

from kronos_connectors.binance.frames import Answer

_PER_REQUEST = 150
"""Streams per SUBSCRIBE: messages stay small."""

_PACE_SECONDS = 0.35
"""Between requests: with pongs and pings at most four a second reach the venue, of five allowed."""

_ANSWER_SECONDS = 10.0


class Session:
    """Follows the streams wanted of it within the venue's rules. Times are seconds, monotonic."""

    def __init__(self, now: float, *, stall_seconds: float, lifetime_seconds: float) -> None:
        self._opened = self._heard = now
        self._stall, self._lifetime = stall_seconds, lifetime_seconds
        self._wanted: frozenset[str] = frozenset()
        self._asked: set[str] = set()
        self._open: dict[int, float] = {}
        self._next_request = now
        self._number = 0
        self._trouble = ""

    @property
    def live(self) -> bool:
        """Whether all that is wanted was asked for and granted."""
        return not self._open and self._asked == self._wanted

    def want(self, streams: Collection[str]) -> None:
        """Follow exactly these."""
        self._wanted = frozenset(streams)

    def requests(self, now: float) -> list[bytes]:
        """What to send now; at most one message."""
        if now < self._next_request:
            return []
        for method, streams in (
            ("SUBSCRIBE", self._wanted - self._asked),
            ("UNSUBSCRIBE", self._asked - self._wanted),
        ):
            if streams:
                part = list(islice(sorted(streams), _PER_REQUEST))
                self._asked.symmetric_difference_update(part)
                self._number += 1
                self._open[self._number] = now + _ANSWER_SECONDS
                self._next_request = now + _PACE_SECONDS
                request = {"method": method, "params": part, "id": self._number}
                return [orjson.dumps(request)]
        return []

    def wake(self, now: float) -> float:
        """Seconds until :meth:`requests` or :meth:`verdict` may say something new."""
        moments = [self._heard + self._stall, self._opened + self._lifetime, *self._open.values()]
        if self._asked != self._wanted:
            moments.append(self._next_request)
        return max(0.0, min(moments) - now)

    def heard(self, now: float) -> None:
        """A frame came."""
        self._heard = now

    def answered(self, answer: Answer) -> None:
        """The venue answers a request."""
        if answer.id is not None:
            self._open.pop(answer.id, None)
        if answer.error:
            self._trouble = f"request refused: {answer.error}"

    def shut_down(self) -> None:
        """The server says that it will go away."""
        self._lifetime = 0.0

    def broken(self, now: float) -> str:
        """Why the connection is of no more use; empty if it is."""
        if self._trouble:
            return self._trouble
        if now - self._heard >= self._stall:
            return f"nothing heard for {self._stall:g} s"
        if any(until <= now for until in self._open.values()):
            return f"no answer to a request in {_ANSWER_SECONDS:g} s"
        return ""

    def tired(self, now: float) -> bool:
        """Whether another should take its place while it still works."""
        return now - self._opened >= self._lifetime
