"""What the broker shall send us: a pure machine that says what to ask for next."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

PER_REQUEST = 100
"""Topics per request: packets stay small."""

_STRANGERS = 10_000
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
        self._held: set[str] = set()
        self._strange: set[str] = set()

    def want(self, topics: Collection[str]) -> None:
        """Set all that shall be sent."""
        self._wanted = frozenset(topics)
        self._strange -= self._wanted

    def connected(self) -> None:
        """A new connection: all is asked for anew, which costs nothing where it is there."""
        self._held.clear()
        self.refused.clear()

    def again(self) -> None:
        """Ask once more for what was refused."""
        self.refused.clear()

    def arrived(self, topic: str) -> bool:
        """Whether a message of ``topic`` is wanted; if not, it is not to come again."""
        if topic in self._wanted:
            return True
        if len(self._strange) < _STRANGERS:
            self._strange.add(topic)
        return False

    def granted(self, topics: Collection[str]) -> None:
        self._held.update(topics)

    def ended(self, topics: Collection[str]) -> None:
        self._held.difference_update(topics)
        self._strange.difference_update(topics)

    def request(self) -> Subscribe | Unsubscribe | None:
        """What to ask the broker for, to be answered before the next."""
        gone = sorted((self._held - self._wanted) | self._strange)
        if gone:
            return Unsubscribe(gone[:PER_REQUEST])
        new = sorted(self._wanted - self._held - self.refused.keys())
        return Subscribe(new[:PER_REQUEST]) if new else None
