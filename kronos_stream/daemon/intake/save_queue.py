"""Closed bars on their way into the state file: those that come together are committed together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeAlias, TypeVar

from kronos_stream.bars.effects import Append, Begin, Confirm, Revise
from kronos_stream.daemon.storage.state import State, StateError

Change: TypeAlias = Begin | Append | Revise | Confirm
"""What of a tape's effects is to be saved."""

_COMMIT_SIZE, _YIELD_EVERY = 5_000, 64
"""Changes committed together; changes handed on before other tasks have their turn."""

_SOFT_LIMIT, _HARD_LIMIT = 20_000, 200_000
"""Changes not saved yet: when no more history is asked for, and when they are too many."""


_T = TypeVar("_T")


class SaveQueue(Generic[_T]):
    """Saves changes in the order in which they are put, and tells each one when it is safe."""

    def __init__(
        self,
        state: State,
        write: Callable[[Sequence[tuple[_T, Change]]], Awaitable[None]],
        on_saved: Callable[[_T, Change], None],
    ) -> None:
        """write: makes changes safe, all or none. saved: told each one then, in order."""
        self._state, self._write, self._on_saved = state, write, on_saved
        self._unsaved: deque[tuple[_T, Change]] = deque()
        self.commits = 0
        """Times that something was saved."""
        self._committing = False
        self._added, self._has_room = asyncio.Event(), asyncio.Event()
        self._has_room.set()

    def __len__(self) -> int:
        """Changes that are not saved yet."""
        return len(self._unsaved)

    @property
    def idle(self) -> bool:
        return not self._unsaved and not self._committing

    def put(self, owner: _T, change: Change) -> None:
        self._unsaved.append((owner, change))
        self._added.set()
        if len(self._unsaved) > _SOFT_LIMIT:
            self._has_room.clear()

    async def wait_for_room(self) -> None:
        """Return when it makes sense to ask for more."""
        await self._has_room.wait()

    def check_overflow(self) -> None:
        """Raises StateError if bars come faster than they can be saved."""
        if len(self._unsaved) > _HARD_LIMIT:
            raise StateError(
                f"{self._state.path}: cannot keep up, {len(self._unsaved)} closed bars wait to be "
                "saved; use a faster disk or fewer series"
            )

    async def run(self, maybe_idle: asyncio.Event) -> None:
        """Until cancelled. calm: set whenever nothing is left to save."""
        while True:
            await self._added.wait()
            self._added.clear()
            while self._unsaved:
                self._committing = True
                group = [
                    self._unsaved.popleft() for _ in range(min(len(self._unsaved), _COMMIT_SIZE))
                ]
                await self._commit(group)
                self.commits += 1
                self._committing = False
                if len(self._unsaved) <= _SOFT_LIMIT:
                    self._has_room.set()
            maybe_idle.set()

    async def _commit(self, group: list[tuple[_T, Change]]) -> None:
        await self._write(group)
        for i, (owner, change) in enumerate(group, 1):
            self._on_saved(owner, change)
            if i % _YIELD_EVERY == 0:
                await asyncio.sleep(0)
