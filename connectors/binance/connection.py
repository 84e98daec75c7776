"""State of one websocket, as a pure state machine: events and the time in, requests out.

Times are seconds of any monotonic clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice
from typing import NamedTuple

import orjson

from kronos_connectors._shared.rotating_pool import NEVER
from kronos_connectors.binance.frames import Response

STREAMS_PER_REQUEST = 150
"""Streams per SUBSCRIBE, to keep messages small."""

REQUEST_INTERVAL_SECONDS = 0.35
"""Between requests: at most four messages a second with pongs, of the five that are allowed."""

RESPONSE_TIMEOUT_SECONDS = 5.0
"""Deadline of the response to a request."""


class Send(NamedTuple):
    """Send a text message."""

    member: Connection
    message: bytes


class Connection:
    """Subscribes to streams within the venue's limits, and detects sockets to be replaced.

    A server that is silent for ``stall_seconds`` is sent a request: a response proves that it works
    and its markets are just quiet. At the age of ``lifetime_seconds`` the connection expires.
    """

    def __init__(self, *, stall_seconds: float, lifetime_seconds: float) -> None:
        self.opened_at = NEVER
        """Time of the handshake."""
        self.live_since = NEVER
        """Time at which the first subscriptions were confirmed."""
        self._stall, self._lifetime = stall_seconds, lifetime_seconds
        self._candle_timeout = NEVER
        self._last_activity = self._last_candle = NEVER
        self._streams: frozenset[str] = frozenset()
        self._requested: set[str] = set()
        self._response_deadlines: dict[int, float] = {}
        self._next_request_at = 0.0
        self._last_request_id = 0
        self._error = ""
        self._shutting_down = False

    # -- in --------------------------------------------------------------------------------

    def on_opened(self, now: float) -> None:
        """Record a successful handshake."""
        self.opened_at = self._last_activity = self._next_request_at = now

    def assign(self, streams: Collection[str], candle_timeout: float) -> None:
        """Subscribe to exactly these streams; a kline is due every ``candle_timeout`` seconds."""
        self._streams, self._candle_timeout = frozenset(streams), candle_timeout

    def on_activity(self, now: float) -> None:
        """Record any frame."""
        self._last_activity = now

    def on_candle(self, now: float) -> None:
        """Record a kline."""
        self._last_activity = self._last_candle = now

    def on_response(self, response: Response, now: float) -> None:
        """Record the response to a request."""
        known = (
            response.id is not None and self._response_deadlines.pop(response.id, None) is not None
        )
        if response.error:
            self._error = f"request refused: {response.error}"
        elif known and self.live_since == NEVER and self._confirmed:
            self.live_since = self._last_candle = now

    def on_shutdown(self) -> None:
        """Record that the server announced to close the connection."""
        self._shutting_down = True

    # -- out -------------------------------------------------------------------------------

    @property
    def complete_since(self) -> float:
        return self.live_since if self._confirmed else NEVER

    @property
    def _confirmed(self) -> bool:
        return not self._response_deadlines and self._requested == self._streams

    def requests(self, now: float) -> Iterator[Send]:
        message = self.next_request(now)
        if message is not None:
            yield Send(self, message)

    def next_request(self, now: float) -> bytes | None:
        """Message to send now, if any."""
        if self.opened_at == NEVER or now < self._next_request_at:
            return None
        for method, streams in (
            ("UNSUBSCRIBE", self._requested - self._streams),  # first: the connection may be full
            ("SUBSCRIBE", self._streams - self._requested),
        ):
            if streams:
                batch = list(islice(sorted(streams), STREAMS_PER_REQUEST))
                self._requested.symmetric_difference_update(batch)
                return self._encode_request(now, {"method": method, "params": batch})
        if now >= self._last_activity + self._stall and not self._response_deadlines:
            return self._encode_request(now, {"method": "LIST_SUBSCRIPTIONS"})
        return None

    def _encode_request(self, now: float, request: dict[str, object]) -> bytes:
        self._last_request_id += 1
        self._response_deadlines[self._last_request_id] = now + RESPONSE_TIMEOUT_SECONDS
        self._next_request_at = now + REQUEST_INTERVAL_SECONDS
        return orjson.dumps({**request, "id": self._last_request_id})

    def failure(self, now: float) -> str:
        """Reason to close it; empty while it works."""
        if self._error:
            return self._error
        if any(deadline <= now for deadline in self._response_deadlines.values()):
            return f"no answer within {RESPONSE_TIMEOUT_SECONDS:g} s"
        return f"no kline for {self._candle_timeout:g} s" if self.candle_overdue(now) else ""

    def candle_overdue(self, now: float) -> bool:
        """Return whether a kline should have arrived by now."""
        return now >= self._last_candle + self._candle_timeout

    def expired(self, now: float) -> bool:
        """Return whether it is to be replaced although it works."""
        return self._shutting_down or now >= self.opened_at + self._lifetime

    def next_wakeup(self, now: float) -> float:
        """Time at which the results of the other methods may next change by themselves."""
        if self.opened_at == NEVER:
            return NEVER
        moments = [
            self.opened_at + self._lifetime,
            self._last_candle + self._candle_timeout,
            self._next_request_at,
        ]
        moments += self._response_deadlines.values()
        if not self._response_deadlines:
            moments.append(self._last_activity + self._stall)
        return min((moment for moment in moments if moment > now), default=NEVER)
