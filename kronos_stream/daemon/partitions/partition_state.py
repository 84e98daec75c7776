"""State of an assigned partition: how far it is read and done, and what its series need.

The committed checkpoint names the first record that is not done, later ones that are, and the
offset from which all contexts can be rebuilt.
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
"""Records read back at most from a partition whose checkpoint has no usable metadata."""

LATE_BARS = 16
"""Bars kept beyond the lookback, for late records that trigger a forecast of an older bar."""

_STALE_LOOKBACKS = 4
"""Lookbacks behind the newest series after which a series no longer delays ``rebuild_start``."""


class RelayedSeriesView(NamedTuple):
    """Status of a series that another process assembles."""

    last: Bar
    next: int
    silent: bool = False
    has_gap: bool = False
    pending_count: int = 0
    placeholder_count: int = 0


@dataclass(slots=True, eq=False)
class SeriesProgress:
    """Progress of one series. Offsets are those of its bars' records."""

    series: Series
    newest: Bar
    history_opens: dict[int, None] = field(default_factory=dict)
    """Opens of its newest bars that were only relayed as history, ascending."""
    offsets: deque[int] = field(default_factory=deque)
    """Of bars that contexts may still need, oldest first."""
    pending_offsets: dict[int, None] = field(default_factory=dict)
    """Of forecast requests that are not done, oldest first."""

    @property
    def sequencer(self) -> RelayedSeriesView:
        return RelayedSeriesView(self.newest, self.series.timeframe.after(self.newest.candle.time))

    def misalignment(self, time: int) -> str:
        """Reason why no bar of this series can open then; empty if one can."""
        step = self.series.timeframe.milliseconds
        if step is None or (time - self.newest.candle.time) % step == 0:
            return ""
        return f"its open {time} ms is not aligned with the bars before it"

    def append(self, offset: int, bar: Bar, lookback: int, *, history: bool) -> None:
        self.newest = bar
        self.offsets.append(offset)
        self.trim(lookback)
        if history:
            self.history_opens[bar.candle.time] = None
            if len(self.history_opens) > LATE_BARS:
                del self.history_opens[next(iter(self.history_opens))]

    def pop_history(self, time: int) -> bool:
        """Return True if the bar was only relayed as history so far, and forget that.

        Of two ingesters that relay the same bars, one may just have started.
        """
        return self.history_opens.pop(time, 0) is None

    def trim(self, lookback: int) -> None:
        """Drop offsets that no context needs any more, counting bars of pending requests."""
        first, kept = next(iter(self.pending_offsets), None), lookback + LATE_BARS
        while len(self.offsets) > kept and (first is None or self.offsets[kept] <= first):
            self.offsets.popleft()


@dataclass(slots=True, eq=False)
class PartitionState:
    """State of one partition. Offsets are those of the record to be read next."""

    next_offset: int
    commit_offset: int
    """All records before it are done."""
    done_offsets: set[int]
    """Done records after ``commit_offset``."""
    rebuild_end: int
    """Offset at which all contexts are rebuilt."""
    started_at: int
    """UTC ms."""
    checkpoint: Checkpoint | None
    """Last one known to be committed."""
    series: dict[Series, SeriesProgress] = field(default_factory=dict)
    pending: dict[int, ForecastRequest | Series] = field(default_factory=dict)
    """By offset: forecast requests, and removed series, whose messages are not delivered."""

    @property
    def rebuilt(self) -> bool:
        return self.next_offset >= self.rebuild_end

    def is_unprocessed(self, offset: int) -> bool:
        """Return whether the record there is not done."""
        return offset >= self.commit_offset and offset not in self.done_offsets

    def add_pending(self, offset: int, request: ForecastRequest) -> None:
        self.pending[offset] = request
        self.series[request.series].pending_offsets[offset] = None

    def mark_done(self, offset: int, lookback: int) -> None:
        """Mark a pending record as done."""
        item = self.pending.pop(offset)
        self.done_offsets.add(offset)
        if isinstance(item, ForecastRequest) and (one := self.series.get(item.series)) is not None:
            one.pending_offsets.pop(offset, None)
            one.trim(lookback)

    def next_checkpoint(self, lookback: int) -> Checkpoint:
        """Move ``commit_offset`` to the first record that is not done, and return its checkpoint.

        While contexts are rebuilt, that is the last committed one.
        """
        if not self.rebuilt and self.checkpoint is not None:
            return self.checkpoint
        self.commit_offset = max(self.commit_offset, min(self.pending, default=self.next_offset))
        self.done_offsets = {offset for offset in self.done_offsets if offset > self.commit_offset}
        start = min(self.commit_offset, self._rebuild_start(lookback))
        metadata = CommitMetadata(start, lookback, self.done_offsets)
        return Checkpoint(self.commit_offset, encode_metadata(metadata, self.commit_offset))

    def _rebuild_start(self, lookback: int) -> int:
        """Offset of the oldest bar that a context needs; series without new bars do not count."""
        newest = max((one.newest.candle.time for one in self.series.values()), default=0)
        stale = _STALE_LOOKBACKS * lookback
        return min(
            (
                one.offsets[0]
                for series, one in self.series.items()
                if one.pending_offsets
                or series.timeframe.after(one.newest.candle.time, stale) >= newest
            ),
            default=self.commit_offset,
        )


def initial_state(
    bounds: PartitionBounds, lookback: int, catch_up: Literal["newest", "all"], now: int
) -> PartitionState:
    """State from which to read a newly assigned partition. now: UTC ms."""
    first, end, context_start, checkpoint = bounds
    done: set[int] = set()
    if checkpoint is None:
        base = first if catch_up == "all" else end
        start = context_start
    else:
        if checkpoint.offset < first:
            _log.error("records expired before their forecast", records=first - checkpoint.offset)
        base = min(max(checkpoint.offset, first), end)
        metadata = decode_metadata(checkpoint.metadata, checkpoint.offset)
        if checkpoint.offset > end:  # the partition was recreated or truncated
            _log.error("partition ends before its checkpoint", done=checkpoint.offset, end=end)
            metadata = None
        done = set() if metadata is None else metadata.done_offsets
        if metadata is not None and metadata.lookback != lookback:
            _log.warning(
                "another member of the group has a different LOOKBACK; set the same for all",
                ours=lookback,
                theirs=metadata.lookback,
            )
        if metadata is not None and metadata.lookback >= lookback:
            start = metadata.rebuild_start
        else:
            start = context_start if context_start <= base else base - _MAX_REREAD
    return PartitionState(max(first, min(start, base)), base, done, base, now, checkpoint)
