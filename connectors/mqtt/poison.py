"""Search for records that make a broker close the connection.

Some brokers refuse a message by disconnecting, and then all pending messages are unacknowledged.
These records are sent singly the next time, until the one that causes the disconnect is known.
"""

from __future__ import annotations

from collections.abc import Collection


class PoisonTracker:
    """Suspected and identified records, by sequence number."""

    def __init__(self) -> None:
        self._suspects: set[int] = set()
        self._poison: dict[int, str] = {}

    def is_suspect(self, sequence: int) -> bool:
        """True if this record must be sent alone."""
        return sequence in self._suspects

    def poison_reason(self, sequence: int) -> str | None:
        """Why this record must not be sent again, or None."""
        return self._poison.get(sequence)

    def on_disconnected(self, inflight: Collection[int], reason: str) -> None:
        """The broker disconnected, probably because of one of these records."""
        if len(inflight) == 1 and self._suspects.issuperset(inflight):  # sent alone
            self._poison.update(dict.fromkeys(inflight, reason))
        self._suspects.update(inflight)

    def discard(self, sequences: Collection[int]) -> None:
        """Forget records that were acknowledged or refused."""
        if self._suspects:
            self._suspects.difference_update(sequences)
            for sequence in self._poison.keys() & set(sequences):
                del self._poison[sequence]
