"""Records of an assigned partition, and the forecast requests that they trigger."""

from __future__ import annotations

from random import Random

import pytest

from kronos_stream.daemon.requests import ForecastRequest
from kronos_stream.interfaces.feed import Partition, PartitionBounds, SeriesRemoved
from kronos_stream.market.candle import Bar
from kronos_stream.market.candle_message import RelayedBar
from tests.support.partition_group import (
    LOOKBACK,
    PARTITION,
    SERIES,
    feed_bars,
    make_tracker,
    random_candle,
    relayed_bar,
)

OTHER_PARTITION = Partition(PARTITION.log, 4)


class _Tracked:
    """Tracker of two partitions from their first record."""

    def __init__(self, degraded: str = "forecast") -> None:
        self.requests: list[ForecastRequest] = []
        self.reasons: list[str] = []
        self.tracker = make_tracker(self.requests, self.reasons, degraded=degraded)
        partitions = [PARTITION, OTHER_PARTITION]
        self.tracker.on_assigned(partitions)
        for partition in partitions:
            self.tracker.start_partition(partition, PartitionBounds(0, 0, 0, None))

    @property
    def minutes(self) -> list[int]:
        return [request.origin // 60_000 for request in self.requests]


@pytest.fixture
def tracked() -> _Tracked:
    return _Tracked()


def test_bar_that_two_ingesters_relay_is_requested_once(tracked: _Tracked) -> None:
    """The second one just started, and relays as history what is new to the first one."""
    bars = [relayed_bar(0, history=history) for history in (True, False, False)]
    feed_bars(tracked.tracker, bars)
    assert tracked.minutes == [0]


def test_bars_first_relayed_as_history_are_requested_when_relayed_as_new(
    tracked: _Tracked,
) -> None:
    """The second ingester just started, and the first one lags behind it."""
    bars = [relayed_bar(at, history=at < LOOKBACK) for at in range(LOOKBACK + 2)]
    bars += [relayed_bar(at) for at in range(LOOKBACK - 2, LOOKBACK + 2)]
    feed_bars(tracked.tracker, bars)
    assert sorted(tracked.minutes) == list(range(LOOKBACK - 2, LOOKBACK + 2))


@pytest.mark.parametrize(("degraded", "skip_reason"), [("skip", "gap"), ("forecast", None)])
def test_missing_bars_skip_the_forecast_if_configured(
    degraded: str, skip_reason: str | None
) -> None:
    tracked = _Tracked(degraded)
    bars = [relayed_bar(at, history=at < LOOKBACK - 1) for at in range(LOOKBACK)]
    series, bar, history = bars[LOOKBACK - 3]
    bars[LOOKBACK - 3] = RelayedBar(series, Bar(bar.candle, synthetic=True), history)
    feed_bars(tracked.tracker, bars)
    assert [request.skip_reason for request in tracked.requests] == [skip_reason]


def test_misaligned_bar_is_rejected_and_leaves_the_context_whole(tracked: _Tracked) -> None:
    bars = [relayed_bar(at) for at in range(LOOKBACK)]
    time = bars[-2].bar.candle.time + 30_000
    bars.insert(-1, RelayedBar(SERIES[0], Bar(random_candle(Random(0), time)), history=False))
    feed_bars(tracked.tracker, bars)
    assert len(tracked.reasons) == 1
    assert "is not aligned with the bars before it" in tracked.reasons[0]
    assert tracked.minutes == list(range(LOOKBACK))
    assert tracked.requests[-1].skip_reason is None


def test_series_in_a_second_partition_is_rejected(tracked: _Tracked) -> None:
    feed_bars(tracked.tracker, [relayed_bar(at) for at in range(LOOKBACK)])
    following = relayed_bar(LOOKBACK)
    feed_bars(tracked.tracker, [following, SeriesRemoved(SERIES[0])], OTHER_PARTITION)
    assert tracked.reasons == ["bars of its series are in another partition"] * 2
    tracked.tracker.on_records(PARTITION, [(LOOKBACK, following)], LOOKBACK + 1)
    assert tracked.minutes == list(range(LOOKBACK + 1))
    assert tracked.requests[-1].skip_reason is None
