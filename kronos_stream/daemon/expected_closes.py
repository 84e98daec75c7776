"""Next expected bar close of each series: a batch waits for all series that share one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Generic, TypeVar

_T = TypeVar("_T")


class ExpectedCloses(Generic[_T]):
    """Items by the close of their next bar, UTC ms. Items are hashable; each has one close."""

    def __init__(self) -> None:
        self._closes: dict[_T, int] = {}
        self._items: defaultdict[int, set[_T]] = defaultdict(set)

    def expect(self, item: _T, close: int) -> None:
        """Replace the item's expected close."""
        self.discard(item)
        self._closes[item] = close
        self._items[close].add(item)

    def discard(self, item: _T) -> None:
        """Expect nothing of the item any more."""
        close = self._closes.pop(item, None)
        if close is not None:
            self._items[close].discard(item)
            if not self._items[close]:
                del self._items[close]

    def pending(self, close: int) -> Collection[_T]:
        """Items whose next bar closes at ``close``."""
        return self._items.get(close, ())
