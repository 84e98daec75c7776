"""A partition that moves between members: all bars are forecast, always from the same window."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from kronos_stream.daemon.partitions.partition_state import LATE_BARS
from kronos_stream.daemon.requests import ForecastRequest
from kronos_stream.interfaces.feed import (
    Checkpoint,
    FeedRecord,
    Partition,
    PartitionBounds,
    SeriesRemoved,
    Unreadable,
)
from kronos_stream.market.candle import Bar
from kronos_stream.market.candle_message import RelayedBar
from kronos_stream.market.series import Series
from tests.support.partition_group import (
    LOOKBACK,
    MINUTE,
    PARTITION,
    SERIES,
    BarId,
    SimulatedGroup,
    feed_bars,
    make_tracker,
    random_candle,
    relayed_bar,
)


def _random_log(random: Random, bars: int) -> list[FeedRecord]:  # noqa: C901 - a branch per event
    """Records of several series, as ingest writes them with crashes and absences."""
    log: list[FeedRecord] = []
    relayed: dict[Series, list[Bar]] = {one: [] for one in SERIES}
    times = dict.fromkeys(SERIES, 0)

    def start(one: Series, bars: int) -> None:
        for _ in range(bars):
            bar = Bar(random_candle(random, times[one]), received=1)
            times[one] = MINUTE.after(times[one])
            relayed[one].append(bar)
            log.append(RelayedBar(one, bar, history=True))

    for one in SERIES:
        start(one, LOOKBACK + random.randrange(20))
    for _ in range(bars):
        one, chance = random.choice(SERIES), random.random()
        if chance < 0.80 or not relayed[one]:
            bar = Bar(random_candle(random, times[one]), synthetic=chance < 0.05, received=1)
            times[one] = MINUTE.after(times[one])
            relayed[one].append(bar)
            log.append(RelayedBar(one, bar, history=False))
        elif chance < 0.88:  # a revision of the newest or of an older bar
            at = random.choice((-1, -1, -min(5, len(relayed[one]))))
            old = relayed[one][at]
            bar = Bar(random_candle(random, old.candle.time), old.revision + 1, received=2)
            relayed[one][at] = bar
            log.append(RelayedBar(one, bar, history=at != -1))
        elif chance < 0.95:  # ingest crashed, and repeats some bars
            log += [RelayedBar(one, bar, history=False) for bar in relayed[one][-3:]]
        elif chance < 0.96:
            times[one] += 60_000 * random.randrange(5)  # it was absent for too long
        elif chance < 0.97:  # and starts again, with history
            times[one] += 60_000 * random.randrange(3)
            start(one, random.randrange(2 * LOOKBACK))
        elif chance < 0.98:
            log.append(SeriesRemoved(one))
            relayed[one].clear()
        else:
            log.append(random.choice((None, Unreadable(None, "not JSON", b"{"))))
    return log


async def _expected(log: Sequence[FeedRecord]) -> dict[BarId, str]:
    """Deliveries of a single member without failures."""
    group = SimulatedGroup(log, Random(0))
    group.assign()
    for _ in log:
        group.read(1)
        await group.owner.forecast(len(log))
        group.owner.deliver()
    assert len(group.delivered) == len(dict(group.delivered))
    return dict(group.delivered)


async def _check(group: SimulatedGroup) -> None:
    expected = await _expected(group.log)
    for bar_id, digest in group.delivered:
        assert expected[bar_id] == digest, bar_id
    removed = {one.series for one in group.log if isinstance(one, SeriesRemoved)}
    missing = expected.keys() - dict(group.delivered).keys()
    assert all(series in removed for series, _, _ in missing)
    assert group.checkpoint is not None
    assert group.checkpoint.offset == len(group.log)


async def _run_with_rebalances(group: SimulatedGroup, *, crashes: bool) -> None:
    random = group.random
    members = [group.new_member() for _ in range(3)]
    group.assign(members[0])
    for _ in range(60):
        for _ in range(random.randrange(12)):
            await group.step()
        if crashes and random.random() < 0.3:
            members = [one for one in members if one is not group.owner]
            members.append(group.new_member())
        else:
            await group.revoke()
        group.assign(random.choice(members))
    await group.finish()


@pytest.mark.parametrize("seed", range(60))
async def test_all_bars_are_forecast_from_the_same_windows_despite_crashes(seed: int) -> None:
    random = Random(seed)
    group = SimulatedGroup(_random_log(random, 400), random)
    await _run_with_rebalances(group, crashes=True)
    await _check(group)


@pytest.mark.parametrize("seed", range(60))
async def test_orderly_rebalances_repeat_no_forecast(seed: int) -> None:
    random = Random(1_000 + seed)
    group = SimulatedGroup(_random_log(random, 400), random)
    await _run_with_rebalances(group, crashes=False)
    await _check(group)
    assert len(group.delivered) == len(dict(group.delivered))


async def test_member_that_keeps_its_partition_rereads_nothing() -> None:
    random = Random(5)
    group = SimulatedGroup(_random_log(random, 200), random)
    group.assign()
    for _ in range(40):
        await group.step()
    position = group.position
    assert position > 0
    group.assign(await group.revoke())
    assert group.position == position
    await group.finish()
    await _check(group)


async def test_new_member_rereads_only_what_contexts_need() -> None:
    log = [
        relayed_bar(minute, history=minute < LOOKBACK, series=one)
        for minute in range(10 * LOOKBACK)
        for one in SERIES
    ]
    group = SimulatedGroup(log, Random(6))
    group.assign()
    await group.finish()
    group.assign()
    assert group.position == len(log) - (LOOKBACK + LATE_BARS) * len(SERIES)


async def test_series_without_new_bars_does_not_delay_the_start_offset() -> None:
    active, ended = SERIES[:2]
    log = [
        relayed_bar(minute, history=minute < LOOKBACK, series=one)
        for minute in range(10 * LOOKBACK)
        for one in ((active, ended) if minute < 2 * LOOKBACK else (active,))
    ]
    group = SimulatedGroup(log, Random(7))
    group.assign()
    await group.finish()
    group.assign()
    assert group.position == len(log) - LOOKBACK - LATE_BARS


async def test_history_after_waiting_bars_does_not_shorten_their_context() -> None:
    """Ingest restarted while the group lagged; the next owner still reads enough bars."""
    flags = [True] * 60 + [False] * 10 + [True] * 60
    log = [relayed_bar(minute, history=history) for minute, history in enumerate(flags)]
    group = SimulatedGroup(log, Random(9))
    group.assign()
    group.read(len(log))
    group.commit()
    group.assign()
    assert group.position == 60 + 1 - LOOKBACK - LATE_BARS
    group.read(len(log))
    await group.finish()
    assert dict(group.delivered) == await _expected(log)


async def test_reading_pauses_while_forecasts_are_not_delivered() -> None:
    group = SimulatedGroup([relayed_bar(minute) for minute in range(9_000)], Random(8))
    member = group.assign()
    while not member.tracker.paused():
        group.read(100)
        for request in member.waiting:
            member.tracker.mark_published(request, request.origin)
        member.waiting.clear()
    assert group.position == 2_000
    member.tracker.mark_delivered(60_000 * 1_000)
    assert not member.tracker.paused()


def test_series_of_partitions_assigned_to_others_are_dropped() -> None:
    other, requests = Partition(PARTITION.log, 4), list[ForecastRequest]()
    tracker = make_tracker(requests)
    tracker.on_assigned([PARTITION, other])
    for partition, one in ((PARTITION, SERIES[0]), (other, SERIES[1])):
        tracker.start_partition(partition, PartitionBounds(0, 1, 0, None))
        feed_bars(tracker, [relayed_bar(0, series=one)], partition)
    assert tracker.outstanding_bars(120_000) == 2
    tracker.on_revoked()
    tracker.on_assigned([PARTITION])
    assert tracker.series.keys() == {SERIES[0]}
    assert tracker.outstanding_bars(120_000) == 1
    assert [request.series for request in requests] == SERIES[:2]


# -- start offsets -------------------------------------------------------------------------


@pytest.mark.parametrize(("catch_up", "base"), [("all", 100), ("newest", 900)])
def test_start_of_a_group_without_checkpoint(catch_up: str, base: int) -> None:
    requests: list[ForecastRequest] = []
    tracker = make_tracker(requests, catch_up=catch_up)
    tracker.on_assigned([PARTITION])
    bounds = PartitionBounds(100, 900, 700, None)
    assert tracker.start_partition(PARTITION, bounds) == min(base, 700)
    records = [(minute, relayed_bar(minute)) for minute in range(100, 1_000)]
    tracker.on_records(PARTITION, records, 1_000)
    assert requests[0].origin == 60_000 * base


def test_checkpoint_of_a_member_with_shorter_contexts_is_extended() -> None:
    checkpoint: Checkpoint | None = None
    for lookback in (8, LOOKBACK):
        tracker = make_tracker(lookback=lookback)
        tracker.on_assigned([PARTITION])
        start = tracker.start_partition(PARTITION, PartitionBounds(0, 99, 20, checkpoint))
        if checkpoint is not None:
            assert checkpoint.offset > start
            assert start == 20, "the first record recent enough for the longer context"
        records = [(minute, relayed_bar(minute)) for minute in range(start, 99)]
        tracker.on_records(PARTITION, records, 99)
        tracker.mark_delivered(0)
        checkpoint = tracker.pending_checkpoints()[PARTITION]._replace(offset=99)


def test_partition_that_ends_before_its_checkpoint_continues_at_its_end() -> None:
    requests: list[ForecastRequest] = []
    tracker = make_tracker(requests)
    tracker.on_assigned([PARTITION])
    checkpoint = Checkpoint(1_000, '{"v":1,"start":900,"bars":40,"done":"1-5"}')
    assert tracker.start_partition(PARTITION, PartitionBounds(0, 10, 0, checkpoint)) == 0
    records = [(minute, relayed_bar(minute)) for minute in range(1_010)]
    tracker.on_records(PARTITION, records, 1_010)
    assert [request.origin for request in requests] == [60_000 * at for at in range(10, 1_010)]
