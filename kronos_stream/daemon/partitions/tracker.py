"""Assigned partitions of the candle topics: their contexts, requests and progress.

The tracker does no I/O. Whether a record triggers a forecast depends only on its offset, and the
window is captured when the record is read: every member of the group, also after a crash, forecasts
it from the same bars.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Literal

from kronos_stream.bars.contexts import ContextBuffer
from kronos_stream.bars.window import Window
from kronos_stream.daemon.expected_closes import ExpectedCloses
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
"""Undelivered requests at which reading pauses."""


class PartitionTracker:
    """Partition handler of the feed, and window source of the scheduler. Times are UTC ms."""

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
        """submit: called with each forecast request. retract: called with each removed series.

        drain_in_flight: cancels waiting requests, and delivers the current batch; bounded in time.
        catch_up: start of a partition without checkpoint: "all" is its first record, "newest" the
            next one to be written.
        degraded: "skip" sets a skip reason while bars of the context are missing.
        dead_letter: called with series (if known), reason and content of what is rejected.
        """
        self._drain_in_flight = drain_in_flight
        self._submit, self._retract, self._dead_letter = submit, retract, dead_letter
        self._clock, self._metrics = clock, metrics
        self._lookback, self._catch_up, self._strict = lookback, catch_up, degraded == "skip"
        self._contexts: dict[Series, ContextBuffer] = {}
        self._partitions: dict[Partition, PartitionState] = {}
        self._revoked: dict[Partition, PartitionState] = {}
        """Kept until the next assignment, which may return them."""
        self._locations: dict[ForecastRequest | Series, tuple[Partition, int]] = {}
        self._windows: dict[ForecastRequest | Series, Window] = {}
        self._published: set[ForecastRequest | Series] = set()
        """In the outbox, but not delivered yet."""
        self._undelivered: deque[tuple[float, ForecastRequest | Series]] = deque()
        self._expected_closes: ExpectedCloses[SeriesProgress] = ExpectedCloses()
        self.series: dict[Series, SeriesProgress] = {}
        """Read-only for others."""
        self._unstarted: set[Partition] = set()
        self._lag = 0
        self._joined = self._closed = False

    # -- for the scheduler and the publisher -----------------------------------------------

    async def window(self, request: ForecastRequest) -> Window | None:
        """Window captured for a request; None if its partition is no longer assigned."""
        return self._windows.get(request)

    def outstanding_bars(self, close: int) -> int:
        """Number of series whose bar that closes then was not read yet."""
        return len(self._expected_closes.pending(close))

    def owns(self, item: ForecastRequest | Series) -> bool:
        """Return whether a request or removal is of an assigned partition, and not done."""
        location = self._locations.get(item)
        return location is not None and location[0] in self._partitions

    def removal_pending(self, series: Series) -> bool:
        """Return whether the removal of a series must still be published."""
        return self.owns(series) and series not in self._published

    def mark_published(self, item: ForecastRequest | Series, sequence: float) -> None:
        """The item is done once all records up to ``sequence`` are delivered. Sequences grow."""
        self._windows.pop(item, None)
        self._published.add(item)
        self._undelivered.append((sequence, item))

    def mark_delivered(self, through: float) -> None:
        """Records up to this sequence are delivered."""
        while self._undelivered and self._undelivered[0][0] <= through:
            self._complete(self._undelivered.popleft()[1])

    @property
    def unready_reason(self) -> str:
        """Reason why nothing can be forecast yet; empty if there is none."""
        if not self._joined:
            return "no partitions are assigned yet"
        if self._unstarted:
            return f"{len(self._unstarted)} partitions are not looked up yet"
        states = self._partitions.values()
        behind = sum(max(0, one.rebuild_end - one.next_offset) for one in states)
        return f"{behind:,} records are still to be read back" if behind else ""

    @property
    def has_backlog(self) -> bool:
        """True while records are to be read or requests to be done."""
        return bool(self._locations) or self._lag > 0

    # -- for the feed ----------------------------------------------------------------------

    def paused(self) -> Collection[Partition]:
        """Partitions not to be read now: all contexts are rebuilt first, and requests bounded."""
        rebuilt = [partition for partition, one in self._partitions.items() if one.rebuilt]
        # A batch of all series must fit, or it would wait for bars that are not read.
        full = len(self._locations) >= max(_MAX_PENDING, 2 * len(self.series))
        return rebuilt if full or len(rebuilt) < len(self._partitions) else ()

    async def drain(self) -> None:
        """All partitions are about to be revoked: take in no more, finish the current batch."""
        self._closed = True
        await self._drain_in_flight()

    def on_lag(self, lags: Mapping[str, int]) -> None:
        """Records of assigned partitions that are not read yet, by topic."""
        self._lag = sum(lags.values())
        for log, lag in lags.items():
            self._metrics.candle_lag.labels(log).set(lag)

    def on_assigned(self, partitions: Collection[Partition]) -> None:
        """Exactly these are assigned; the state of others is dropped."""
        self._metrics.rebalances.inc()
        self._joined, self._closed, self._unstarted = True, False, set(partitions)
        for partition in self._revoked.keys() - set(partitions):
            self._drop(self._revoked.pop(partition))

    def start_partition(self, partition: Partition, bounds: PartitionBounds) -> int:
        """Return the offset to read from: where reading stopped, or the checkpoint's."""
        self._unstarted.discard(partition)
        if partition in self._partitions:  # its revocation was not reported
            self._drop(self._partitions.pop(partition))
        state = self._revoked.pop(partition, None)
        if state is not None:
            if state.checkpoint is not None and state.checkpoint == bounds.checkpoint:
                self._resume(partition, state)
                return state.next_offset
            self._drop(state)
        state = initial_state(bounds, self._lookback, self._catch_up, self._clock.now())
        self._partitions[partition] = state
        return state.next_offset

    def on_records(
        self, partition: Partition, records: Iterable[tuple[int, FeedRecord]], next_offset: int
    ) -> None:
        """Process records of a partition."""
        state = self._partitions.get(partition)
        if state is None or self._closed:
            return  # revoked, or read before its start offset was known
        rebuilding = not state.rebuilt
        for offset, record in records:
            if offset >= state.next_offset:
                state.next_offset = offset + 1
                self._process(partition, state, offset, record)
        state.next_offset = max(state.next_offset, next_offset)
        if rebuilding and state.rebuilt:
            self._metrics.rebuilds.observe((self._clock.now() - state.started_at) / 1000)

    def on_revoked(self) -> None:
        """No partition is assigned any more; their state is kept for the next assignment."""
        self._revoked |= self._partitions
        self._partitions.clear()

    def pending_checkpoints(self) -> Mapping[Partition, Checkpoint]:
        """Checkpoints to be committed, where they changed."""
        return {
            partition: checkpoint
            for partition, state in self._partitions.items()
            if (checkpoint := state.next_checkpoint(self._lookback)) != state.checkpoint
        }

    def on_checkpointed(self, checkpoints: Mapping[Partition, Checkpoint]) -> None:
        """These are committed."""
        for partition, checkpoint in checkpoints.items():
            if (state := self._partitions.get(partition)) is not None:
                state.checkpoint = checkpoint

    # -- state of partitions ---------------------------------------------------------------

    def _resume(self, partition: Partition, state: PartitionState) -> None:
        self._partitions[partition] = state
        for item in [*state.pending.values()]:
            if item in self._published:
                continue
            if isinstance(item, ForecastRequest):
                self._submit(item)
            else:
                self._retract(item)

    def _drop(self, state: PartitionState) -> None:
        for item in state.pending.values():
            self._forget_item(item)
        for series in [*state.series]:
            self._forget_series(state, series)

    def _forget_item(self, item: ForecastRequest | Series) -> tuple[Partition, int] | None:
        """Forget a request or removal; return its location, if known."""
        self._windows.pop(item, None)
        self._published.discard(item)
        return self._locations.pop(item, None)

    def _forget_series(self, state: PartitionState, series: Series) -> None:
        if (progress := state.series.pop(series, None)) is not None:
            self._expected_closes.discard(progress)
            self._contexts.pop(series, None)
            self.series.pop(series, None)

    def _complete(self, item: ForecastRequest | Series) -> None:
        location = self._forget_item(item)
        if location is None:
            return  # its partition was dropped meanwhile
        partition, offset = location
        state = self._partitions.get(partition) or self._revoked[partition]
        state.mark_done(offset, self._lookback)

    # -- records ---------------------------------------------------------------------------

    def _process(
        self, partition: Partition, state: PartitionState, offset: int, record: FeedRecord
    ) -> None:
        unprocessed = state.is_unprocessed(offset)
        if isinstance(record, RelayedBar):
            if reason := self._reject_reason(state, record):
                raw = encode_bar(*record[:2], history=record.history)
                record = Unreadable(record.series, reason, raw)
            else:
                request = self._apply_bar(state, offset, record)
                if request is not None and unprocessed:
                    self._submit_request(partition, state, offset, request)
        elif isinstance(record, SeriesRemoved):
            if self._in_other_partition(state, record.series):
                record = Unreadable(record.series, _WRONG_PARTITION, b"")
            else:
                self._remove_series(state, record.series)
                if unprocessed and record.series not in self._locations:
                    state.pending[offset] = record.series
                    self._locations[record.series] = partition, offset
                    self._retract(record.series)
        if isinstance(record, Unreadable) and unprocessed:
            venue = "" if record.series is None else record.series.venue
            self._metrics.rejected.labels(venue).inc()
            self._dead_letter(*record)

    def _remove_series(self, state: PartitionState, series: Series) -> None:
        """Forget a series; its pending requests are done."""
        self._forget_series(state, series)
        for item in [*state.pending.values()]:
            if isinstance(item, ForecastRequest) and item.series == series:
                self._complete(item)

    def _in_other_partition(self, state: PartitionState, series: Series) -> bool:
        return series in self.series and series not in state.series

    def _reject_reason(self, state: PartitionState, record: RelayedBar) -> str:
        """Reason why a bar is invalid; empty if it is valid."""
        if self._in_other_partition(state, record.series):
            return _WRONG_PARTITION
        progress = state.series.get(record.series)
        return "" if progress is None else progress.misalignment(record.bar.candle.time)

    def _apply_bar(
        self, state: PartitionState, offset: int, record: RelayedBar
    ) -> ForecastRequest | None:
        """Put a bar into its context; return the request that it triggers, if any."""
        series, bar, history = record
        progress, time = state.series.get(series), bar.candle.time
        after = series.timeframe.after
        if progress is None or time > progress.newest.candle.time:
            if progress is None or after(progress.newest.candle.time) != time:
                # The first bar, or a gap: older bars do not belong to its context.
                self._contexts[series] = ContextBuffer(series, self._lookback + LATE_BARS)
            if progress is None:
                progress = state.series[series] = self.series[series] = SeriesProgress(series, bar)
            self._contexts[series].append(bar)
            progress.append(offset, bar, self._lookback, history=history)
            self._expected_closes.expect(progress, after(time, 2))
        elif self._contexts[series].supersedes(bar):
            self._contexts[series].revise(bar)
            if time < progress.newest.candle.time or bar.revision == progress.newest.revision:
                return None
            progress.newest = bar
            progress.pop_history(time)
        elif history or not progress.pop_history(time):
            return None
        if history:
            return None
        close = after(time)
        received = max(close, bar.received or self._clock.now())
        skip_reason = self._contexts[series].skip_reason(self._lookback, strict=self._strict)
        return ForecastRequest(series, time, bar.revision, close, received, skip_reason)

    def _submit_request(
        self, partition: Partition, state: PartitionState, offset: int, request: ForecastRequest
    ) -> None:
        if request.skip_reason is None:
            window = self._contexts[request.series].window(request.origin, self._lookback)
            if window is None:
                return  # a late record of a bar that is older than the context
            self._windows[request] = window
        state.add_pending(offset, request)
        self._locations[request] = partition, offset
        self._submit(request)
