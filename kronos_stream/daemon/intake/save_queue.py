"""Closed bars waiting for the state file; those that arrive together are committed together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from kronos_stream.bars.effects import Append, Begin, Confirm, Revise
from kronos_stream.daemon.intake.series_state import SeriesState
from kronos_stream.daemon.storage.database import StateError
from kronos_stream.daemon.storage.state import PublishedBar, State

Change: TypeAlias = Begin | Append | Revise | Confirm
"""Effects of a sequencer that are saved."""

Relay: TypeAlias = Callable[[Sequence[PublishedBar]], Awaitable[None]]
"""Saves bars and publishes them to other processes, all or none."""

_BATCH_SIZE = 5_000
_SOFT_LIMIT, _HARD_LIMIT = 20_000, 200_000
"""Unsaved changes at which backfill pauses, and at which the daemon stops."""


class SaveQueue:
    """Changes in the order of their arrival."""

    def __init__(self, path: Path) -> None:
        """path: of the state file, for error messages."""
        self._path = path
        self._unsaved: deque[tuple[SeriesState, Change]] = deque()
        self._committing = False
        self._added, self._has_room = asyncio.Event(), asyncio.Event()
        self._has_room.set()
        self.commits = 0
        """Batches saved so far."""

    def __len__(self) -> int:
        """Changes that are not in a batch yet."""
        return len(self._unsaved)

    @property
    def idle(self) -> bool:
        return not self._unsaved and not self._committing

    def put(self, owner: SeriesState, change: Change) -> None:
        self._unsaved.append((owner, change))
        self._added.set()
        if len(self._unsaved) > _SOFT_LIMIT:
            self._has_room.clear()

    async def wait_for_room(self) -> None:
        """Return when few enough changes are unsaved for a backfill request."""
        await self._has_room.wait()

    def check_overflow(self) -> None:
        """Raises StateError if bars arrive faster than they can be saved."""
        if len(self._unsaved) > _HARD_LIMIT:
            raise StateError(
                f"{self._path}: cannot keep up, {len(self._unsaved)} closed bars wait to be "
                "saved; use a faster disk or fewer series"
            )

    async def next_batch(self) -> Sequence[tuple[SeriesState, Change]]:
        """Wait for changes and take the oldest; call :meth:`batch_done` once they are saved."""
        while not self._unsaved:
            self._added.clear()
            await self._added.wait()
        self._committing = True
        return [self._unsaved.popleft() for _ in range(min(len(self._unsaved), _BATCH_SIZE))]

    def batch_done(self) -> None:
        self.commits += 1
        self._committing = False
        if len(self._unsaved) <= _SOFT_LIMIT:
            self._has_room.set()


async def save_changes(
    state: State, changes: Sequence[tuple[SeriesState, Change]], relay: Relay | None
) -> None:
    """Write changes, all bars in one transaction: to the state file, or by ``relay`` if given."""
    rows: list[PublishedBar] = []
    watermarks: dict[SeriesState, tuple[int, int] | None] = {}
    for one, change in changes:
        watermark = watermarks.get(one, one.watermark)
        if isinstance(change, Begin):
            await state.init_watermark(one.series, change.origin)
            watermarks[one] = watermark or (change.origin, 0)
            continue
        place = change.bar.candle.time, change.bar.revision
        is_new = watermark is not None and place > watermark
        if is_new:
            watermarks[one] = place
        rows.append(PublishedBar(one.series, change.bar, is_new))
    if relay is None:
        await state.save_bars([row[:2] for row in rows])
    else:
        await relay(rows)
