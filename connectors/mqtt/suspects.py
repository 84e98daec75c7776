"""Which record it was that a broker ended the connection over.

Some say no to a message by hanging up, and everything under way goes with it. So those records
are sent one by one the next time, until the one that does it stands alone.
"""

from __future__ import annotations

from collections.abc import Collection


class Suspects:
    """Records are told apart by their sequence."""

    def __init__(self) -> None:
        self._suspects: set[int] = set()
        self._guilty: dict[int, str] = {}

    def alone(self, sequence: int) -> bool:
        """Whether nothing else may be under way together with this record."""
        return sequence in self._suspects

    def guilty(self, sequence: int) -> str | None:
        """Why it is not to be sent again, if it is not."""
        return self._guilty.get(sequence)

    def hung_up(self, under_way: Collection[int], why: str) -> None:
        """The broker ended the connection, it seems over one of these."""
        if len(under_way) == 1 and self._suspects.issuperset(under_way):  # not for the first time
            self._guilty.update(dict.fromkeys(under_way, why))
        self._suspects.update(under_way)

    def delivered(self, sequences: Collection[int]) -> None:
        """These have been taken or refused, and will not come again."""
        if self._suspects:
            self._suspects.difference_update(sequences)
            for sequence in self._guilty.keys() & set(sequences):
                del self._guilty[sequence]
