"""What the broker shall send us: a pure machine that says what to ask for next."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

TOPICS_PER_REQUEST = 100
"""Topics per request: packets stay small."""

_MAX_UNWANTED = 10_000
"""Unwanted topics remembered at most; what is forgotten comes again, and is noticed again."""


class Subscribe(NamedTuple):
    """Ask to be sent these."""

    topics: Sequence[str]


class Unsubscribe(NamedTuple):
    """Ask not to be sent these any more."""

    topics: Sequence[str]


class Subscriptions:
    """The topics of one session, which may outlive a connection and this process.

    What it holds from earlier times nobody tells us, but from what arrives.
    """

    def __init__(self) -> None:
        self.refused: dict[str, str] = {}
        """Topics that the broker does not let us have, and why."""
        self._wanted: frozenset[str] = frozenset()
        self._active: set[str] = set()
        self._unwanted: set[str] = set()

    def set_wanted(self, topics: Collection[str]) -> None:
        """Set all that shall be sent."""
        self._wanted = frozenset(topics)
        self._unwanted -= self._wanted

    def on_connected(self) -> None:
        """A new connection: all is asked for anew, which costs nothing where it is there."""
        self._active.clear()
        self.refused.clear()

    def retry_refused(self) -> None:
        """Ask once more for what was refused."""
        self.refused.clear()

    def on_message(self, topic: str) -> bool:
        """Whether a message of ``topic`` is wanted; if not, it is not to come again."""
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
        """What to ask the broker for, to be answered before the next."""
        gone = sorted((self._active - self._wanted) | self._unwanted)
        if gone:
            return Unsubscribe(gone[:TOPICS_PER_REQUEST])
        new = sorted(self._wanted - self._active - self.refused.keys())
        return Subscribe(new[:TOPICS_PER_REQUEST]) if new else None
