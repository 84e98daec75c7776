"""What a group has given this daemon: parts of the logs, their contexts, how far each is done.

A pure machine. A record that is due is so by its place in the log, and its window is taken when it
is read: so whoever forecasts it, in whatever company and after whatever crash, starts from the same
bars.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Literal

from kronos_stream.daemon.due import Due
from kronos_stream.daemon.metrics import Metrics
from kronos_stream.daemon.share import LATE_BARS, Line, Share, placed
from kronos_stream.market.clock import Clock
from kronos_stream.market.contexts import ContextStore, Window
from kronos_stream.market.feed import (
    PartitionBounds,
    SeriesRemoved,
    Checkpoint,
    Partition,
    FeedRecord,
    Unreadable,
)
from kronos_stream.market.series import Series
from kronos_stream.market.wire import RelayedBar, encode_bar

_ELSEWHERE = "bars of its series are in another partition"

_MOST_UNDONE = 2_000
"""Bars whose forecasts are not delivered, after which no more is read for now."""


class Allotment:
    """See the module. Offsets are of records to be read next; times are UTC ms."""

    def __init__(
        self,
        due: Callable[[Due], None],
        retract: Callable[[Series], None],
        bury: Callable[[Series | None, str, bytes], None],
        finish: Callable[[], Awaitable[None]],
        clock: Clock,
        metrics: Metrics,
        *,
        lookback: int,
        catch_up: Literal["newest", "all"],
        degraded: Literal["forecast", "skip"] = "forecast",
    ) -> None:
        """due: told each bar to forecast from. retract: told each series that is given up.

        catch_up: where nothing is noted of a part, "all" begins with its first record, "newest"
            with the next to come. degraded: as of a Desk. bury: told what cannot be.
        finish: takes back what waits, finishes and delivers what is in hand; bounded.
        """
        self._finish_in_hand = finish
        self._due, self._retract, self._bury = due, retract, bury
        self._clock, self._metrics = clock, metrics
        self._lookback, self._catch_up, self._degraded = lookback, catch_up, degraded
        self._contexts = ContextStore(lookback + LATE_BARS)
        self._shares: dict[Partition, Share] = {}
        self._left: dict[Partition, Share] = {}
        """Taken from us, but all is still here, should we get them back."""
        self._places: dict[Due | Series, tuple[Partition, int]] = {}
        self._windows: dict[Due | Series, Window] = {}
        self._handed: set[Due | Series] = set()
        """What was handed over, but is not delivered yet."""
        self._tickets: deque[tuple[float, Due | Series]] = deque()
        self._awaited: Counter[int] = Counter()
        self._lines: dict[Series, Line] = {}
        self._unbegun: set[Partition] = set()
        self._unread = 0
        self._joined = self._closed = False

    # -- for the scheduler and the press --------------------------------------------------

    def window(self, due: Due) -> Window | None:
        """What ``due`` is forecast from; None if it is not ours any more."""
        return self._windows.get(due)

    def awaited(self, close: int) -> int:
        """Series whose bar that closes then has not been read yet."""
        return self._awaited[close]

    def holds(self, due: Due | Series) -> bool:
        """Whether it is ours, and not done."""
        place = self._places.get(due)
        return place is not None and place[0] in self._shares

    def owes(self, series: Series) -> bool:
        """Whether readers are still to be told that it is given up."""
        return self.holds(series) and series not in self._handed

    def handed(self, due: Due | Series, ticket: float) -> None:
        """It is done once all before ``ticket`` is delivered; tickets grow."""
        self._windows.pop(due, None)
        self._handed.add(due)
        self._tickets.append((ticket, due))

    def delivered(self, through: float) -> None:
        """All up to this ticket is delivered."""
        while self._tickets and self._tickets[0][0] <= through:
            self._finish(self._tickets.popleft()[1])

    @property
    def lines(self) -> Mapping[Series, Line]:
        """For whoever looks."""
        return self._lines

    @property
    def unready(self) -> str:
        """Why there is nothing to forecast from yet, in words; empty if all is well."""
        if not self._joined:
            return "the group has given us nothing yet"
        if self._unbegun:
            return f"{len(self._unbegun)} parts are not looked up yet"
        behind = sum(max(0, share.until - share.next) for share in self._shares.values())
        return f"{behind:,} records are still to be read back" if behind else ""

    @property
    def behind(self) -> bool:
        """Whether something is left to read, or to forecast."""
        return bool(self._places) or self._unread > 0

    # -- for the feed ---------------------------------------------------------------------

    def enough(self) -> Collection[Partition]:
        """Parts of which no more should be read just now: first all contexts are to be whole."""
        whole = [part for part, share in self._shares.items() if share.next >= share.until]
        # A close of all series must find room, or it would be waited for in vain.
        full = len(self._places) >= max(_MOST_UNDONE, 2 * len(self._lines))
        return whole if full or len(whole) < len(self._shares) else ()

    async def give_up(self) -> None:
        """All parts are about to be taken: take in nothing more, finish what is in hand."""
        self._closed = True
        await self._finish_in_hand()

    def lags(self, lags: Mapping[str, int]) -> None:
        """By log: how many records of our parts are not read yet."""
        self._unread = sum(lags.values())
        for log, lag in lags.items():
            self._metrics.candle_lag.labels(log).set(lag)

    def given(self, parts: Collection[Partition]) -> None:
        """Exactly these are ours; what is kept of others is let go."""
        self._metrics.rebalances.inc()
        self._joined, self._closed, self._unbegun = True, False, set(parts)
        for part in self._left.keys() - set(parts):
            self._drop(self._left.pop(part))

    def begin(self, part: Partition, extent: PartitionBounds) -> int:
        """Where to read ``part`` from: on from where we were, or back from what is noted."""
        self._unbegun.discard(part)
        if part in self._shares:  # nobody said that it was taken
            self._drop(self._shares.pop(part))
        share = self._left.pop(part, None)
        if share is not None and share.note is not None and share.note == extent.checkpoint:
            self._resume(part, share)
            return share.next
        if share is not None:
            self._drop(share)
        share = placed(extent, self._lookback, self._catch_up, self._clock.now())
        self._shares[part] = share
        return share.next

    def read(
        self, part: Partition, records: Iterable[tuple[int, FeedRecord]], reached: int
    ) -> None:
        """Take in records of a part."""
        share = self._shares.get(part)
        if share is None or self._closed:
            return  # taken from us, or read before it was known from where
        behind = share.next < share.until
        for offset, told in records:
            if offset >= share.next:
                share.next = offset + 1
                self._take(part, share, offset, told)
        share.next = max(share.next, reached)
        if behind and share.next >= share.until:
            self._metrics.rebuilds.observe((self._clock.now() - share.began) / 1000)

    def taken(self) -> None:
        """Keep what was ours, should it come back."""
        self._left |= self._shares
        self._shares.clear()

    def notes(self) -> Mapping[Partition, Checkpoint]:
        """What is to be noted, where it has changed."""
        notes = {part: share.noting(self._lookback) for part, share in self._shares.items()}
        return {part: note for part, note in notes.items() if note != self._shares[part].note}

    def noted(self, notes: Mapping[Partition, Checkpoint]) -> None:
        """These are safe."""
        for part, note in notes.items():
            if (share := self._shares.get(part)) is not None:
                share.note = note

    # -- parts that come and go -----------------------------------------------------------

    def _resume(self, part: Partition, share: Share) -> None:
        self._shares[part] = share
        for due in [*share.undone.values()]:
            if due in self._handed:
                continue
            if isinstance(due, Due):
                self._due(due)
            else:
                self._retract(due)

    def _drop(self, share: Share) -> None:
        for due in share.undone.values():
            self._places.pop(due, None)
            self._windows.pop(due, None)
            self._handed.discard(due)
        for series in [*share.lines]:
            self._forget(share, series)

    def _forget(self, share: Share, series: Series) -> None:
        if (line := share.lines.pop(series, None)) is not None:
            self._expect(line, 0)
            self._contexts.remove(series)
            self._lines.pop(series, None)

    # -- records --------------------------------------------------------------------------

    def _take(self, part: Partition, share: Share, offset: int, told: FeedRecord) -> None:
        asked = share.asks(offset)
        if isinstance(told, RelayedBar):
            if fault := self._fault(share, told):
                told = Unreadable(told.series, fault, encode_bar(*told[:2], history=told.history))
            else:
                due = self._put(share, offset, told)
                if due is not None and asked:
                    self._ask(part, share, offset, due)
        elif isinstance(told, SeriesRemoved) and self._elsewhere(share, told.series):
            told = Unreadable(told.series, _ELSEWHERE, b"")
        elif isinstance(told, SeriesRemoved):
            self._end(part, share, offset, told.series, asked=asked)
        if isinstance(told, Unreadable) and asked:
            venue = "" if told.series is None else told.series.venue
            self._metrics.rejected.labels(venue).inc()
            self._bury(*told)

    def _end(
        self, part: Partition, share: Share, offset: int, series: Series, *, asked: bool
    ) -> None:
        """A series is given up: what waits of it is done, and readers are told."""
        self._forget(share, series)
        for waiting in [*share.undone.values()]:
            if isinstance(waiting, Due) and waiting.series == series:
                self._finish(waiting)
        if asked and series not in self._places:
            share.undone[offset] = series
            self._places[series] = part, offset
            self._retract(series)

    def _elsewhere(self, share: Share, series: Series) -> bool:
        return series in self._lines and series not in share.lines

    def _fault(self, share: Share, told: RelayedBar) -> str:
        """Why a bar cannot be, in words; empty if it can."""
        if self._elsewhere(share, told.series):
            return _ELSEWHERE
        line = share.lines.get(told.series)
        return "" if line is None else line.misfit(told.bar.candle.time)

    def _put(self, share: Share, offset: int, relayed: RelayedBar) -> Due | None:
        """Put a bar into its context; the bar as due if it is to be forecast from."""
        series, bar, history = relayed
        line, time = share.lines.get(series), bar.candle.time
        after = series.timeframe.after
        if line is None or time > line.newest.candle.time:
            if line is None or after(line.newest.candle.time) != time:
                # A hole, or the beginning: what came before is no context of this.
                self._contexts.load(series, (), complete=True)
            if line is None:
                line = share.lines[series] = self._lines[series] = Line(series, bar)
            self._contexts.append(series, bar)
            line.put(offset, bar, self._lookback, history=history)
            self._expect(line, after(time, 2))
        elif self._contexts.supersedes(series, bar):
            self._contexts.revise(series, bar)
            if time < line.newest.candle.time or bar.revision == line.newest.revision:
                return None
            line.newest = bar
            line.was_history(time)
        elif history or not line.was_history(time):
            return None
        if history:
            return None
        close = after(time)
        received = max(close, bar.received or self._clock.now())
        strict = self._degraded == "skip"
        obstacle = self._contexts.skip_reason(series, self._lookback, strict=strict)
        return Due(series, time, bar.revision, close, received, obstacle)

    def _ask(self, part: Partition, share: Share, offset: int, due: Due) -> None:
        if due.obstacle is None:
            window = self._contexts.window(due.series, due.origin, self._lookback)
            if window is None:
                return  # a late word on a bar from before the context began
            self._windows[due] = window
        share.ask(offset, due)
        self._places[due] = part, offset
        self._due(due)

    def _expect(self, line: Line, close: int) -> None:
        for moment, change in ((line.expected, -1), (close, 1)):
            if moment:
                self._awaited[moment] += change
                if not self._awaited[moment]:
                    del self._awaited[moment]
        line.expected = close

    # -- what is done ---------------------------------------------------------------------

    def _finish(self, due: Due | Series) -> None:
        place = self._places.pop(due, None)
        self._windows.pop(due, None)
        self._handed.discard(due)
        if place is None:
            return  # let go meanwhile
        part, offset = place
        (self._shares.get(part) or self._left[part]).finish(offset, self._lookback)
