"""A simulated partition: its log, its committed checkpoint, and trackers that take turns on it."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from kronos_stream.bars.window import Window
from kronos_stream.daemon.partitions.tracker import PartitionTracker
from kronos_stream.daemon.requests import ForecastRequest
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.forecast.compose import context_digest
from kronos_stream.interfaces.feed import Checkpoint, FeedRecord, Partition, PartitionBounds
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.candle_message import RelayedBar
from kronos_stream.market.clock import Clock, ManualClock
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

PARTITION = Partition("kronos.candles.1m.v1", 3)
MINUTE = Timeframe.parse("1m")
SERIES = [Series.of("binance", f"{base}/USDT", MINUTE) for base in ("BTC", "ETH", "SOL")]
LOOKBACK = 40

BarId = tuple[Series, int, int]
"""Series, open and revision."""


def random_candle(random: Random, time: int) -> Candle:
    close = 100 + random.random()
    return Candle(time, 100.5, 102.0, 99.0, close, random.random(), None)


def relayed_bar(
    minute: int, *, history: bool = False, series: Series = SERIES[0], seed: int = 0
) -> RelayedBar:
    """Bar that opens at this minute."""
    return RelayedBar(series, Bar(random_candle(Random(seed + minute), 60_000 * minute)), history)


class TrackedMember:
    """A tracker, and a scheduler that forecasts and delivers requests at random."""

    def __init__(self, clock: Clock, delivered: list[tuple[BarId, str]]) -> None:
        self.waiting: list[ForecastRequest] = []
        self.removed: list[Series] = []
        self.in_flight: list[tuple[ForecastRequest, Window | None]] = []
        self._delivered, self._sequence = delivered, 0
        self.tracker = PartitionTracker(
            self.waiting.append,
            self.removed.append,
            lambda *_: None,
            self._drain_in_flight,
            clock,
            Metrics(),
            lookback=LOOKBACK,
            catch_up="all",
        )

    async def _drain_in_flight(self) -> None:
        self.waiting.clear()
        self.removed.clear()
        self.deliver()

    async def forecast(self, count: int) -> None:
        """Start a batch of the requests that wait for longest, and publish removals."""
        batch = self.waiting[:count]
        del self.waiting[:count]
        self.in_flight += [(request, await self.tracker.window(request)) for request in batch]
        for series in self.removed:
            if self.tracker.owns(series):
                self._sequence += 1
                self.tracker.mark_published(series, self._sequence)
        self.removed.clear()

    def deliver(self) -> None:
        """Finish the batch in flight."""
        for request, window in self.in_flight:
            if not self.tracker.owns(request):
                continue
            self._sequence += 1
            if request.skip_reason is None:
                assert window is not None
                bar_id = request.series, request.origin, request.revision
                self._delivered.append((bar_id, context_digest(window.values, window.times)))
            self.tracker.mark_published(request, self._sequence)
        self.in_flight.clear()
        self.tracker.mark_delivered(self._sequence)


class SimulatedGroup:
    """A log, its committed checkpoint, and the member that owns it at present."""

    def __init__(self, log: Sequence[FeedRecord], random: Random) -> None:
        self.log, self.random = log, random
        self.checkpoint: Checkpoint | None = None
        self.delivered: list[tuple[BarId, str]] = []
        """Bars that were forecast, and the digests of their windows."""
        self.clock = ManualClock(10**12)
        self.position = 0
        self.owner = self.new_member()

    def new_member(self) -> TrackedMember:
        return TrackedMember(self.clock, self.delivered)

    def assign(self, member: TrackedMember | None = None) -> TrackedMember:
        """Assign the partition to ``member``, or to a new one."""
        self.owner = member or self.new_member()
        bounds = PartitionBounds(0, len(self.log), len(self.log), self.checkpoint)
        self.owner.tracker.on_assigned([PARTITION])
        self.position = self.owner.tracker.start_partition(PARTITION, bounds)
        return self.owner

    def read(self, count: int) -> None:
        """Hand the next records to the owner."""
        until = min(len(self.log), self.position + count)
        records = [(offset, self.log[offset]) for offset in range(self.position, until)]
        self.owner.tracker.on_records(PARTITION, records, until)
        self.position = until

    async def step(self) -> None:
        """Read, forecast, deliver or commit a little."""
        chance = self.random.random()
        if chance < 0.4 and not self.owner.tracker.paused():
            self.read(self.random.randrange(1, 40))
        elif chance < 0.7:
            await self.owner.forecast(self.random.randrange(len(self.owner.waiting) + 1))
        elif chance < 0.9:
            self.owner.deliver()
        else:
            self.commit()

    def commit(self) -> None:
        checkpoints = self.owner.tracker.pending_checkpoints()
        self.checkpoint = checkpoints.get(PARTITION, self.checkpoint)
        self.owner.tracker.on_checkpointed(checkpoints)

    async def revoke(self) -> TrackedMember:
        """Revoke the partition in an orderly rebalance; return its former owner."""
        await self.owner.tracker.drain()
        self.commit()
        self.owner.tracker.on_revoked()
        return self.owner

    async def finish(self) -> None:
        """Work until everything is delivered and committed."""
        owner = self.owner
        while self.position < len(self.log) or owner.waiting or owner.in_flight or owner.removed:
            await self.step()
        self.commit()


async def _no_op() -> None:
    pass


def make_tracker(
    requests: list[ForecastRequest] | None = None,
    reasons: list[str] | None = None,
    **options: Any,
) -> PartitionTracker:
    """Make a tracker without scheduler. reasons: collects those of rejected records."""

    def dead_letter(_: Series | None, reason: str, __: bytes) -> None:
        if reasons is not None:
            reasons.append(reason)

    return PartitionTracker(
        (lambda _: None) if requests is None else requests.append,
        lambda _: None,
        dead_letter,
        _no_op,
        ManualClock(10**12),
        Metrics(),
        **{"lookback": LOOKBACK, "catch_up": "all", **options},
    )


def feed_bars(
    tracker: PartitionTracker, bars: Sequence[FeedRecord], partition: Partition = PARTITION
) -> None:
    """Hand records to a tracker one by one, from offset 0."""
    for offset, record in enumerate(bars):
        tracker.on_records(partition, [(offset, record)], offset + 1)
