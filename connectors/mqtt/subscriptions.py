"""Subscriptions: state of a session, and the next request to the broker."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

TOPICS_PER_REQUEST = 100
"""Limit per request, for small packets."""

_MAX_UNWANTED = 10_000
"""Limit of remembered topics; a message of any other one is noticed again later."""


class Subscribe(NamedTuple):
    """Request to subscribe."""

    topics: Sequence[str]


class Unsubscribe(NamedTuple):
    """Request to unsubscribe."""

    topics: Sequence[str]


class Subscriptions:
    """Topics of one session, which may outlive a connection and this process.

    Old subscriptions of a session are only known from messages that arrive.
    """

    def __init__(self) -> None:
        self.refused: dict[str, str] = {}
        """Refused topics and the reasons."""
        self._wanted: frozenset[str] = frozenset()
        self._active: set[str] = set()
        self._unwanted: set[str] = set()

    def set_wanted(self, topics: Collection[str]) -> None:
        """Set all topics to subscribe to."""
        self._wanted = frozenset(topics)
        self._unwanted -= self._wanted

    def on_connected(self) -> None:
        """Request all topics again, which changes nothing where the session has them."""
        self._active.clear()
        self.refused.clear()

    def retry_refused(self) -> None:
        """Request refused topics again."""
        self.refused.clear()

    def on_message(self, topic: str) -> bool:
        """Return whether ``topic`` is wanted; if not, it will be unsubscribed."""
        if topic in self._wanted:
            return True
        if len(self._unwanted) < _MAX_UNWANTED:
            self._unwanted.add(topic)
        return False

    def on_subscribed(self, topics: Collection[str]) -> None:
        self._active.update(topics)

    def on_unsubscribed(self, topics: Collection[str]) -> None:
        self._active.difference_update(topics)
        self._unwanted.difference_update(topics)

    def next_request(self) -> Subscribe | Unsubscribe | None:
        """The next request; its response must be known before the next call."""
        if unwanted := sorted((self._active - self._wanted) | self._unwanted):
            return Unsubscribe(unwanted[:TOPICS_PER_REQUEST])
        new = sorted(self._wanted - self._active - self.refused.keys())
        return Subscribe(new[:TOPICS_PER_REQUEST]) if new else None
