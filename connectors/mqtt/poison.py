"""Which record it was that a broker ended the connection over.

Some say no to a message by hanging up, and everything under way goes with it. So those records
are sent one by one the next time, until the one that does it stands alone.
"""

from __future__ import annotations

from collections.abc import Collection


class PoisonTracker:
    """Records are told apart by their sequence."""

    def __init__(self) -> None:
        self._suspects: set[int] = set()
        self._poison: dict[int, str] = {}

    def is_suspect(self, sequence: int) -> bool:
        """Whether nothing else may be under way together with this record."""
        return sequence in self._suspects

    def poison_reason(self, sequence: int) -> str | None:
        """Why it is not to be sent again, if it is not."""
        return self._poison.get(sequence)

    def on_disconnected(self, inflight: Collection[int], reason: str) -> None:
        """The broker ended the connection, it seems over one of these."""
        if len(inflight) == 1 and self._suspects.issuperset(inflight):  # not for the first time
            self._poison.update(dict.fromkeys(inflight, reason))
        self._suspects.update(inflight)

    def discard(self, sequences: Collection[int]) -> None:
        """These have been taken or refused, and will not come again."""
        if self._suspects:
            self._suspects.difference_update(sequences)
            for sequence in self._poison.keys() & set(sequences):
                del self._poison[sequence]
