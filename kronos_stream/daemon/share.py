"""A part of a log that is ours: how far it is read and done, and what its series need.

What is noted of it names the first record that is not done with, those after it that are, and where
to begin reading so that every context is whole again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import structlog

from kronos_stream.daemon.due import Due
from kronos_stream.daemon.notes import Kept, parse, write
from kronos_stream.market.candle import Bar
from kronos_stream.market.feed import PartitionBounds, Checkpoint
from kronos_stream.market.series import Series

_log = structlog.get_logger()

_MOST_BACK = 1_000_000
"""Records of a part read back at most where nobody noted from where."""

LATE_BARS = 16
"""So late a word may come that makes a bar of the past one to forecast from."""

_DEAD_LOOKBACKS = 4
"""A series that is so many lookbacks behind others of its part holds no reading back up."""


class Standing(NamedTuple):
    """What can be told of a series whose tape is somebody else's."""

    last: Bar
    next: int
    silent: bool = False
    holed: bool = False
    held: int = 0
    owed: int = 0


@dataclass(slots=True, eq=False)
class Line:
    """A series of ours."""

    series: Series
    newest: Bar
    history: dict[int, None] = field(default_factory=dict)
    """Opens of those of its newest bars that were told as history alone, ascending."""
    offsets: deque[int] = field(default_factory=deque)
    """Of its bars that contexts may still need, oldest first."""
    expected: int = 0
    """Close of the bar that comes next, UTC ms."""
    undone: dict[int, None] = field(default_factory=dict)
    """Offsets of its due bars that are not done, oldest first."""

    @property
    def tape(self) -> Standing:
        """For whoever looks."""
        return Standing(self.newest, self.series.timeframe.after(self.newest.candle.time))

    def misfit(self, time: int) -> str:
        """Why a bar that opens then cannot be its, in words; empty if it can."""
        step = self.series.timeframe.milliseconds
        if step is None or (time - self.newest.candle.time) % step == 0:
            return ""
        return f"its open is {time} ms, which does not go with the bars before it"

    def put(self, offset: int, bar: Bar, lookback: int, *, history: bool) -> None:
        """Its next bar."""
        self.newest = bar
        self.offsets.append(offset)
        self.trim(lookback)
        if history:
            self.history[bar.candle.time] = None
            if len(self.history) > LATE_BARS:
                del self.history[next(iter(self.history))]

    def was_history(self, time: int) -> bool:
        """Whether a bar was told as history alone, and no more is.

        One of two that pass the same on had just begun.
        """
        return self.history.pop(time, 0) is None

    def trim(self, lookback: int) -> None:
        """Forget offsets that no context needs any more, those of bars undone included."""
        first, kept = next(iter(self.undone), None), lookback + LATE_BARS
        while len(self.offsets) > kept and (first is None or self.offsets[kept] <= first):
            self.offsets.popleft()


@dataclass(slots=True, eq=False)
class Share:
    """A part that is ours. Offsets are of records to be read next."""

    next: int
    """Offset to be read next."""
    base: int
    """Records before it are done with."""
    done: set[int]
    """Records after it that are, too."""
    until: int
    """Contexts are whole from here on."""
    began: int
    """UTC ms."""
    note: Checkpoint | None
    """What is noted of it, for all we know."""
    lines: dict[Series, Line] = field(default_factory=dict)
    undone: dict[int, Due | Series] = field(default_factory=dict)
    """By offset: bars that are due, and series whose end is to be told."""

    def asks(self, offset: int) -> bool:
        """Whether the record there is not done with."""
        return offset >= self.base and offset not in self.done

    def ask(self, offset: int, due: Due) -> None:
        """A bar there is due."""
        self.undone[offset] = due
        self.lines[due.series].undone[offset] = None

    def finish(self, offset: int, lookback: int) -> None:
        """What was undone there is done."""
        due = self.undone.pop(offset)
        self.done.add(offset)
        if isinstance(due, Due) and (line := self.lines.get(due.series)) is not None:
            line.undone.pop(offset, None)
            line.trim(lookback)

    def noting(self, lookback: int) -> Checkpoint:
        """What is to be noted; the base moves up to the first record that is not done with."""
        if self.next < self.until and self.note is not None:
            return self.note  # not all of what it says has been read again
        self.base = max(self.base, min(self.undone, default=self.next))
        self.done = {offset for offset in self.done if offset > self.base}
        kept = Kept(min(self.base, self._start(lookback)), lookback, self.done)
        return Checkpoint(self.base, write(kept, self.base))

    def _start(self, lookback: int) -> int:
        """Offset of the first bar that is still needed; series that have died need none."""
        newest = max((line.newest.candle.time for line in self.lines.values()), default=0)
        dead = _DEAD_LOOKBACKS * lookback
        return min(
            (
                line.offsets[0]
                for series, line in self.lines.items()
                if line.undone or series.timeframe.after(line.newest.candle.time, dead) >= newest
            ),
            default=self.base,
        )


def placed(
    extent: PartitionBounds, lookback: int, catch_up: Literal["newest", "all"], now: int
) -> Share:
    """A share that begins where what is noted says. now: UTC ms."""
    first, end, since, note = extent
    done: set[int] = set()
    if note is None:
        base = first if catch_up == "all" else end
        start = since
    else:
        if note.offset < first:
            _log.error("records were gone before they were forecast", records=first - note.offset)
        base = min(max(note.offset, first), end)
        kept = parse(note.metadata, note.offset)
        if note.offset > end:  # the log is not what it was
            _log.error("the log ends before what is done", done=note.offset, end=end)
            kept = None
        done = set() if kept is None else kept.done
        if kept is not None and kept.bars != lookback:
            _log.warning(
                "somebody of this group has another LOOKBACK; its members must be set alike",
                ours=lookback,
                theirs=kept.bars,
            )
        if kept is not None and kept.bars >= lookback:
            start = kept.start
        else:
            start = since if since <= base else base - _MOST_BACK
    return Share(max(first, min(start, base)), base, done, base, now, note)
