"""A part of a log that is ours: how far it is read and done, and what its series need.

What is noted of it names the first record that is not done with, those after it that are, and where
to begin reading so that every context is whole again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import structlog

from kronos_stream.daemon.partitions.commit_metadata import (
    CommitMetadata,
    decode_metadata,
    encode_metadata,
)
from kronos_stream.daemon.requests import ForecastRequest
from kronos_stream.interfaces.feed import Checkpoint, PartitionBounds
from kronos_stream.market.candle import Bar
from kronos_stream.market.series import Series

_log = structlog.get_logger()

_MAX_REREAD = 1_000_000
"""Records of a part read back at most where nobody noted from where."""

LATE_BARS = 16
"""So late a word may come that makes a bar of the past one to forecast from."""

_STALE_LOOKBACKS = 4
"""A series that is so many lookbacks behind others of its part holds no reading back up."""


class RelayedSeriesView(NamedTuple):
    """What can be told of a series whose tape is somebody else's."""

    last: Bar
    next: int
    silent: bool = False
    has_gap: bool = False
    pending_count: int = 0
    placeholder_count: int = 0


@dataclass(slots=True, eq=False)
class SeriesProgress:
    """A series of ours."""

    series: Series
    newest: Bar
    history_opens: dict[int, None] = field(default_factory=dict)
    """Opens of those of its newest bars that were told as history alone, ascending."""
    offsets: deque[int] = field(default_factory=deque)
    """Of its bars that contexts may still need, oldest first."""
    next_close: int = 0
    """Close of the bar that comes next, UTC ms."""
    pending_offsets: dict[int, None] = field(default_factory=dict)
    """Offsets of its due bars that are not done, oldest first."""

    @property
    def sequencer(self) -> RelayedSeriesView:
        """For whoever looks."""
        return RelayedSeriesView(self.newest, self.series.timeframe.after(self.newest.candle.time))

    def misalignment(self, time: int) -> str:
        """Why a bar that opens then cannot be its, in words; empty if it can."""
        step = self.series.timeframe.milliseconds
        if step is None or (time - self.newest.candle.time) % step == 0:
            return ""
        return f"its open is {time} ms, which does not go with the bars before it"

    def append(self, offset: int, bar: Bar, lookback: int, *, history: bool) -> None:
        """Its next bar."""
        self.newest = bar
        self.offsets.append(offset)
        self.trim(lookback)
        if history:
            self.history_opens[bar.candle.time] = None
            if len(self.history_opens) > LATE_BARS:
                del self.history_opens[next(iter(self.history_opens))]

    def pop_history(self, time: int) -> bool:
        """Whether a bar was told as history alone, and no more is.

        One of two that pass the same on had just begun.
        """
        return self.history_opens.pop(time, 0) is None

    def trim(self, lookback: int) -> None:
        """Forget offsets that no context needs any more, those of bars undone included."""
        first, kept = next(iter(self.pending_offsets), None), lookback + LATE_BARS
        while len(self.offsets) > kept and (first is None or self.offsets[kept] <= first):
            self.offsets.popleft()


@dataclass(slots=True, eq=False)
class PartitionState:
    """A part that is ours. Offsets are of records to be read next."""

    next_offset: int
    """Offset to be read next."""
    commit_offset: int
    """Records before it are done with."""
    done_offsets: set[int]
    """Records after it that are, too."""
    rebuild_end: int
    """Contexts are whole from here on."""
    started_at: int
    """UTC ms."""
    checkpoint: Checkpoint | None
    """What is noted of it, for all we know."""
    series: dict[Series, SeriesProgress] = field(default_factory=dict)
    pending: dict[int, ForecastRequest | Series] = field(default_factory=dict)
    """By offset: bars that are due, and series whose end is to be told."""

    def is_unprocessed(self, offset: int) -> bool:
        """Whether the record there is not done with."""
        return offset >= self.commit_offset and offset not in self.done_offsets

    def add_pending(self, offset: int, request: ForecastRequest) -> None:
        """A bar there is due."""
        self.pending[offset] = request
        self.series[request.series].pending_offsets[offset] = None

    def mark_done(self, offset: int, lookback: int) -> None:
        """What was undone there is done."""
        due = self.pending.pop(offset)
        self.done_offsets.add(offset)
        if isinstance(due, ForecastRequest) and (line := self.series.get(due.series)) is not None:
            line.pending_offsets.pop(offset, None)
            line.trim(lookback)

    def next_checkpoint(self, lookback: int) -> Checkpoint:
        """What is to be noted; the base moves up to the first record that is not done with."""
        if self.next_offset < self.rebuild_end and self.checkpoint is not None:
            return self.checkpoint  # not all of what it says has been read again
        self.commit_offset = max(self.commit_offset, min(self.pending, default=self.next_offset))
        self.done_offsets = {offset for offset in self.done_offsets if offset > self.commit_offset}
        kept = CommitMetadata(
            min(self.commit_offset, self._rebuild_start(lookback)), lookback, self.done_offsets
        )
        return Checkpoint(self.commit_offset, encode_metadata(kept, self.commit_offset))

    def _rebuild_start(self, lookback: int) -> int:
        """Offset of the first bar that is still needed; series that have died need none."""
        newest = max((line.newest.candle.time for line in self.series.values()), default=0)
        dead = _STALE_LOOKBACKS * lookback
        return min(
            (
                line.offsets[0]
                for series, line in self.series.items()
                if line.pending_offsets
                or series.timeframe.after(line.newest.candle.time, dead) >= newest
            ),
            default=self.commit_offset,
        )


def initial_state(
    bounds: PartitionBounds, lookback: int, catch_up: Literal["newest", "all"], now: int
) -> PartitionState:
    """A share that begins where what is noted says. now: UTC ms."""
    first, end, since, note = bounds
    done: set[int] = set()
    if note is None:
        base = first if catch_up == "all" else end
        start = since
    else:
        if note.offset < first:
            _log.error("records were gone before they were forecast", records=first - note.offset)
        base = min(max(note.offset, first), end)
        kept = decode_metadata(note.metadata, note.offset)
        if note.offset > end:  # the log is not what it was
            _log.error("the log ends before what is done", done=note.offset, end=end)
            kept = None
        done = set() if kept is None else kept.done_offsets
        if kept is not None and kept.lookback != lookback:
            _log.warning(
                "somebody of this group has another LOOKBACK; its members must be set alike",
                ours=lookback,
                theirs=kept.lookback,
            )
        if kept is not None and kept.lookback >= lookback:
            start = kept.rebuild_start
        else:
            start = since if since <= base else base - _MAX_REREAD
    return PartitionState(max(first, min(start, base)), base, done, base, now, note)
