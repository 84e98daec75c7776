"""What a group has given this daemon: parts of the logs, their contexts, how far each is done.

A pure machine. A record that is due is so by its place in the log, and its window is taken when it
is read: so whoever forecasts it, in whatever company and after whatever crash, starts from the same
bars.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Literal

from kronos_stream.bars.contexts import ContextStore
from kronos_stream.bars.window import Window
from kronos_stream.daemon.partitions.partition_state import (
    LATE_BARS,
    PartitionState,
    SeriesProgress,
    initial_state,
)
from kronos_stream.daemon.requests import ForecastRequest
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.feed import (
    Checkpoint,
    FeedRecord,
    Partition,
    PartitionBounds,
    SeriesRemoved,
    Unreadable,
)
from kronos_stream.market.candle_message import RelayedBar, encode_bar
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_WRONG_PARTITION = "bars of its series are in another partition"

_MAX_PENDING = 2_000
"""Bars whose forecasts are not delivered, after which no more is read for now."""


class PartitionTracker:
    """See the module. Offsets are of records to be read next; times are UTC ms."""

    def __init__(
        self,
        submit: Callable[[ForecastRequest], None],
        retract: Callable[[Series], None],
        dead_letter: Callable[[Series | None, str, bytes], None],
        drain_in_flight: Callable[[], Awaitable[None]],
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
        self._drain_in_flight = drain_in_flight
        self._submit, self._retract, self._dead_letter = submit, retract, dead_letter
        self._clock, self._metrics = clock, metrics
        self._lookback, self._catch_up, self._degraded = lookback, catch_up, degraded
        self._contexts = ContextStore(lookback + LATE_BARS)
        self._partitions: dict[Partition, PartitionState] = {}
        self._revoked: dict[Partition, PartitionState] = {}
        """Taken from us, but all is still here, should we get them back."""
        self._locations: dict[ForecastRequest | Series, tuple[Partition, int]] = {}
        self._windows: dict[ForecastRequest | Series, Window] = {}
        self._published: set[ForecastRequest | Series] = set()
        """What was handed over, but is not delivered yet."""
        self._undelivered: deque[tuple[float, ForecastRequest | Series]] = deque()
        self._expected_closes: Counter[int] = Counter()
        self._series: dict[Series, SeriesProgress] = {}
        self._unstarted: set[Partition] = set()
        self._lag = 0
        self._joined = self._closed = False

    # -- for the scheduler and the press --------------------------------------------------

    async def window(self, request: ForecastRequest) -> Window | None:
        """Window captured for a request; None if its partition is no longer assigned."""
        return self._windows.get(request)

    def outstanding_bars(self, close: int) -> int:
        """Series whose bar that closes then has not been read yet."""
        return self._expected_closes[close]

    def owns(self, request: ForecastRequest | Series) -> bool:
        """Whether it is ours, and not done."""
        place = self._locations.get(request)
        return place is not None and place[0] in self._partitions

    def removal_pending(self, series: Series) -> bool:
        """Whether readers are still to be told that it is given up."""
        return self.owns(series) and series not in self._published

    def mark_published(self, request: ForecastRequest | Series, sequence: float) -> None:
        """It is done once all before ``ticket`` is delivered; tickets grow."""
        self._windows.pop(request, None)
        self._published.add(request)
        self._undelivered.append((sequence, request))

    def mark_delivered(self, through: float) -> None:
        """All up to this ticket is delivered."""
        while self._undelivered and self._undelivered[0][0] <= through:
            self._complete(self._undelivered.popleft()[1])

    @property
    def series(self) -> Mapping[Series, SeriesProgress]:
        """For whoever looks."""
        return self._series

    @property
    def unready_reason(self) -> str:
        """Why there is nothing to forecast from yet, in words; empty if all is well."""
        if not self._joined:
            return "the group has given us nothing yet"
        if self._unstarted:
            return f"{len(self._unstarted)} parts are not looked up yet"
        behind = sum(
            max(0, share.rebuild_end - share.next_offset) for share in self._partitions.values()
        )
        return f"{behind:,} records are still to be read back" if behind else ""

    @property
    def has_backlog(self) -> bool:
        """Whether something is left to read, or to forecast."""
        return bool(self._locations) or self._lag > 0

    # -- for the feed ---------------------------------------------------------------------

    def paused(self) -> Collection[Partition]:
        """Parts of which no more should be read just now: first all contexts are to be whole."""
        whole = [
            part
            for part, share in self._partitions.items()
            if share.next_offset >= share.rebuild_end
        ]
        # A close of all series must find room, or it would be waited for in vain.
        full = len(self._locations) >= max(_MAX_PENDING, 2 * len(self._series))
        return whole if full or len(whole) < len(self._partitions) else ()

    async def drain(self) -> None:
        """All parts are about to be taken: take in nothing more, finish what is in hand."""
        self._closed = True
        await self._drain_in_flight()

    def on_lag(self, lags: Mapping[str, int]) -> None:
        """By log: how many records of our parts are not read yet."""
        self._lag = sum(lags.values())
        for log, lag in lags.items():
            self._metrics.candle_lag.labels(log).set(lag)

    def on_assigned(self, partitions: Collection[Partition]) -> None:
        """Exactly these are ours; what is kept of others is let go."""
        self._metrics.rebalances.inc()
        self._joined, self._closed, self._unstarted = True, False, set(partitions)
        for part in self._revoked.keys() - set(partitions):
            self._drop(self._revoked.pop(part))

    def start_partition(self, partition: Partition, bounds: PartitionBounds) -> int:
        """Where to read ``part`` from: on from where we were, or back from what is noted."""
        self._unstarted.discard(partition)
        if partition in self._partitions:  # nobody said that it was taken
            self._drop(self._partitions.pop(partition))
        share = self._revoked.pop(partition, None)
        if (
            share is not None
            and share.checkpoint is not None
            and share.checkpoint == bounds.checkpoint
        ):
            self._resume(partition, share)
            return share.next_offset
        if share is not None:
            self._drop(share)
        share = initial_state(bounds, self._lookback, self._catch_up, self._clock.now())
        self._partitions[partition] = share
        return share.next_offset

    def on_records(
        self, partition: Partition, records: Iterable[tuple[int, FeedRecord]], next_offset: int
    ) -> None:
        """Take in records of a part."""
        share = self._partitions.get(partition)
        if share is None or self._closed:
            return  # taken from us, or read before it was known from where
        behind = share.next_offset < share.rebuild_end
        for offset, told in records:
            if offset >= share.next_offset:
                share.next_offset = offset + 1
                self._process(partition, share, offset, told)
        share.next_offset = max(share.next_offset, next_offset)
        if behind and share.next_offset >= share.rebuild_end:
            self._metrics.rebuilds.observe((self._clock.now() - share.started_at) / 1000)

    def on_revoked(self) -> None:
        """Keep what was ours, should it come back."""
        self._revoked |= self._partitions
        self._partitions.clear()

    def pending_checkpoints(self) -> Mapping[Partition, Checkpoint]:
        """What is to be noted, where it has changed."""
        notes = {
            part: share.next_checkpoint(self._lookback) for part, share in self._partitions.items()
        }
        return {
            part: note for part, note in notes.items() if note != self._partitions[part].checkpoint
        }

    def on_checkpointed(self, checkpoints: Mapping[Partition, Checkpoint]) -> None:
        """These are safe."""
        for part, note in checkpoints.items():
            if (share := self._partitions.get(part)) is not None:
                share.checkpoint = note

    # -- parts that come and go -----------------------------------------------------------

    def _resume(self, part: Partition, share: PartitionState) -> None:
        self._partitions[part] = share
        for due in [*share.pending.values()]:
            if due in self._published:
                continue
            if isinstance(due, ForecastRequest):
                self._submit(due)
            else:
                self._retract(due)

    def _drop(self, share: PartitionState) -> None:
        for due in share.pending.values():
            self._locations.pop(due, None)
            self._windows.pop(due, None)
            self._published.discard(due)
        for series in [*share.series]:
            self._forget(share, series)

    def _forget(self, share: PartitionState, series: Series) -> None:
        if (line := share.series.pop(series, None)) is not None:
            self._expect_close(line, 0)
            self._contexts.remove(series)
            self._series.pop(series, None)

    # -- records --------------------------------------------------------------------------

    def _process(
        self, part: Partition, share: PartitionState, offset: int, told: FeedRecord
    ) -> None:
        asked = share.is_unprocessed(offset)
        if isinstance(told, RelayedBar):
            if fault := self._reject_reason(share, told):
                told = Unreadable(told.series, fault, encode_bar(*told[:2], history=told.history))
            else:
                due = self._apply_bar(share, offset, told)
                if due is not None and asked:
                    self._request_forecast(part, share, offset, due)
        elif isinstance(told, SeriesRemoved) and self._in_other_partition(share, told.series):
            told = Unreadable(told.series, _WRONG_PARTITION, b"")
        elif isinstance(told, SeriesRemoved):
            self._remove_series(part, share, offset, told.series, asked=asked)
        if isinstance(told, Unreadable) and asked:
            venue = "" if told.series is None else told.series.venue
            self._metrics.rejected.labels(venue).inc()
            self._dead_letter(*told)

    def _remove_series(
        self, part: Partition, share: PartitionState, offset: int, series: Series, *, asked: bool
    ) -> None:
        """A series is given up: what waits of it is done, and readers are told."""
        self._forget(share, series)
        for waiting in [*share.pending.values()]:
            if isinstance(waiting, ForecastRequest) and waiting.series == series:
                self._complete(waiting)
        if asked and series not in self._locations:
            share.pending[offset] = series
            self._locations[series] = part, offset
            self._retract(series)

    def _in_other_partition(self, share: PartitionState, series: Series) -> bool:
        return series in self._series and series not in share.series

    def _reject_reason(self, share: PartitionState, told: RelayedBar) -> str:
        """Why a bar cannot be, in words; empty if it can."""
        if self._in_other_partition(share, told.series):
            return _WRONG_PARTITION
        line = share.series.get(told.series)
        return "" if line is None else line.misalignment(told.bar.candle.time)

    def _apply_bar(
        self, share: PartitionState, offset: int, relayed: RelayedBar
    ) -> ForecastRequest | None:
        """Put a bar into its context; the bar as due if it is to be forecast from."""
        series, bar, history = relayed
        line, time = share.series.get(series), bar.candle.time
        after = series.timeframe.after
        if line is None or time > line.newest.candle.time:
            if line is None or after(line.newest.candle.time) != time:
                # A hole, or the beginning: what came before is no context of this.
                self._contexts.load(series, (), complete=True)
            if line is None:
                line = share.series[series] = self._series[series] = SeriesProgress(series, bar)
            self._contexts.append(series, bar)
            line.append(offset, bar, self._lookback, history=history)
            self._expect_close(line, after(time, 2))
        elif self._contexts.supersedes(series, bar):
            self._contexts.revise(series, bar)
            if time < line.newest.candle.time or bar.revision == line.newest.revision:
                return None
            line.newest = bar
            line.pop_history(time)
        elif history or not line.pop_history(time):
            return None
        if history:
            return None
        close = after(time)
        received = max(close, bar.received or self._clock.now())
        strict = self._degraded == "skip"
        obstacle = self._contexts.skip_reason(series, self._lookback, strict=strict)
        return ForecastRequest(series, time, bar.revision, close, received, obstacle)

    def _request_forecast(
        self, part: Partition, share: PartitionState, offset: int, due: ForecastRequest
    ) -> None:
        if due.skip_reason is None:
            window = self._contexts.window(due.series, due.origin, self._lookback)
            if window is None:
                return  # a late word on a bar from before the context began
            self._windows[due] = window
        share.add_pending(offset, due)
        self._locations[due] = part, offset
        self._submit(due)

    def _expect_close(self, line: SeriesProgress, close: int) -> None:
        for moment, change in ((line.next_close, -1), (close, 1)):
            if moment:
                self._expected_closes[moment] += change
                if not self._expected_closes[moment]:
                    del self._expected_closes[moment]
        line.next_close = close

    # -- what is done ---------------------------------------------------------------------

    def _complete(self, due: ForecastRequest | Series) -> None:
        place = self._locations.pop(due, None)
        self._windows.pop(due, None)
        self._published.discard(due)
        if place is None:
            return  # let go meanwhile
        part, offset = place
        (self._partitions.get(part) or self._revoked[part]).mark_done(offset, self._lookback)
