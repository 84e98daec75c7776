"""A part of a log, handed around by a seed: all is forecast, and from the same bars."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest

from kronos_stream.bars.window import Window
from kronos_stream.daemon.partitions.partition_state import LATE_BARS
from kronos_stream.daemon.partitions.tracker import PartitionTracker
from kronos_stream.daemon.requests import ForecastRequest
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.forecast.compose import context_digest
from kronos_stream.interfaces.feed import (
    Checkpoint,
    FeedRecord,
    Partition,
    PartitionBounds,
    SeriesRemoved,
    Unreadable,
)
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.candle_message import RelayedBar, decode_bar, encode_bar
from kronos_stream.market.clock import Clock, ManualClock
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

PART = Partition("kronos.candles.1m.v1", 3)
MINUTE = Timeframe.parse("1m")
SERIES = [Series.of("binance", f"{base}/USDT", MINUTE) for base in ("BTC", "ETH", "SOL")]
LOOKBACK = 40

Place = tuple[Series, int, int]


def _candle(random: Random, time: int) -> Candle:
    close = 100 + random.random()
    return Candle(time, 100.5, 102.0, 99.0, close, random.random(), None)


def _log(random: Random, bars: int) -> list[FeedRecord]:  # noqa: C901 - a branch for each mishap
    """What ingest and its mishaps may write of several series, in one order."""
    log: list[FeedRecord] = []
    passed: dict[Series, list[Bar]] = {one: [] for one in SERIES}
    times = dict.fromkeys(SERIES, 0)

    def begin(one: Series, bars: int) -> None:
        for _ in range(bars):
            bar = Bar(_candle(random, times[one]), received=1)
            times[one] = MINUTE.after(times[one])
            passed[one].append(bar)
            log.append(RelayedBar(one, bar, history=True))

    for one in SERIES:
        begin(one, LOOKBACK + random.randrange(20))
    for _ in range(bars):
        one, chance = random.choice(SERIES), random.random()
        if chance < 0.80 or not passed[one]:
            bar = Bar(_candle(random, times[one]), synthetic=chance < 0.05, received=1)
            times[one] = MINUTE.after(times[one])
            passed[one].append(bar)
            log.append(RelayedBar(one, bar, history=False))
        elif chance < 0.88:  # a revision: of the newest, or of an older one
            at = random.choice((-1, -1, -min(5, len(passed[one]))))
            old = passed[one][at]
            bar = Bar(_candle(random, old.candle.time), old.revision + 1, received=2)
            passed[one][at] = bar
            log.append(RelayedBar(one, bar, history=at != -1))
        elif chance < 0.95:  # ingest was killed, and tells some of it again
            log += [RelayedBar(one, bar, history=False) for bar in passed[one][-3:]]
        elif chance < 0.96:
            times[one] += 60_000 * random.randrange(5)  # it was away for too long
        elif chance < 0.97:  # and begins anew, with history
            times[one] += 60_000 * random.randrange(3)
            begin(one, random.randrange(2 * LOOKBACK))
        elif chance < 0.98:
            log.append(SeriesRemoved(one))
            passed[one].clear()
        else:
            log.append(random.choice((None, Unreadable(None, "not JSON", b"{"))))
    return log


class _TrackedMember:
    """An allotment, and in place of the scheduler somebody who takes what is due at random."""

    def __init__(self, clock: Clock, *, delivered: list[tuple[Place, str]]) -> None:
        self.waiting: list[ForecastRequest] = []
        self.removed: list[Series] = []
        self.in_flight: list[tuple[ForecastRequest, Window | None]] = []
        self.dead_letters = 0
        self._delivered, self._ticket = delivered, 0
        self.allotment = PartitionTracker(
            self.waiting.append,
            self.removed.append,
            self._count_dead_letter,
            self._finish,
            clock,
            Metrics(),
            lookback=LOOKBACK,
            catch_up="all",
        )

    def _count_dead_letter(self, *_: object) -> None:
        self.dead_letters += 1

    async def _finish(self) -> None:
        self.waiting.clear()
        self.removed.clear()
        self.deliver()

    def take(self, random: Random) -> None:
        """A batch: some of what waits, in order per series."""
        count = random.randrange(len(self.waiting) + 1)
        for due in self.waiting[:count]:
            self.in_flight.append((due, self.allotment.window(due)))
        del self.waiting[:count]
        for series in self.removed:
            if self.allotment.owns(series):
                self._ticket += 1
                self.allotment.mark_published(series, self._ticket)
        self.removed.clear()

    def deliver(self) -> None:
        for due, window in self.in_flight:
            if not self.allotment.owns(due):
                continue
            self._ticket += 1
            if due.skip_reason is None:
                assert window is not None
                place = due.series, due.origin, due.revision
                self._delivered.append((place, context_digest(window.values, window.times)))
            self.allotment.mark_published(due, self._ticket)
        self.in_flight.clear()
        self.allotment.mark_delivered(self._ticket)


class _SimulatedGroup:
    """A log, what is noted of it, and whoever has it just now."""

    def __init__(self, log: Sequence[FeedRecord], random: Random) -> None:
        self.log, self.random = log, random
        self.checkpoint: Checkpoint | None = None
        self.delivered: list[tuple[Place, str]] = []
        self.owner: _TrackedMember | None = None
        self.clock = ManualClock(10**12)
        self.position = 0

    def rebalance(self, member: _TrackedMember) -> None:
        extent = PartitionBounds(0, len(self.log), len(self.log), self.checkpoint)
        member.allotment.on_assigned([PART])
        self.position = member.allotment.start_partition(PART, extent)
        self.owner = member

    def step(self) -> None:
        """Read, forecast, deliver or note a little."""
        owner, random = self.owner, self.random
        assert owner is not None
        chance = random.random()
        if chance < 0.4 and not owner.allotment.paused():
            until = min(len(self.log), self.position + random.randrange(1, 40))
            records = [(at, self.log[at]) for at in range(self.position, until)]
            owner.allotment.on_records(PART, records, until)
            self.position = until
        elif chance < 0.7:
            owner.take(random)
        elif chance < 0.9:
            owner.deliver()
        else:
            self.commit(owner)

    def commit(self, owner: _TrackedMember) -> None:
        notes = owner.allotment.pending_checkpoints()
        self.checkpoint = notes.get(PART, self.checkpoint)
        owner.allotment.on_checkpointed(notes)

    async def hand_over(self) -> _TrackedMember:
        """As a rebalance goes; who had it is given back, and still has what it knows."""
        owner = self.owner
        assert owner is not None
        await owner.allotment.drain()
        self.commit(owner)
        owner.allotment.on_revoked()
        return owner

    def drain(self) -> None:
        owner = self.owner
        assert owner is not None
        while self.position < len(self.log) or owner.waiting or owner.in_flight or owner.removed:
            self.step()
        self.commit(owner)


def _expected(log: Sequence[FeedRecord]) -> dict[Place, str]:
    """What somebody delivers to whom nothing ever happens."""
    group = _SimulatedGroup(log, Random(0))
    group.rebalance(_TrackedMember(group.clock, delivered=group.delivered))
    owner = group.owner
    assert owner is not None
    for at, told in enumerate(log):
        owner.allotment.on_records(PART, [(at, told)], at + 1)
        owner.in_flight += [(due, owner.allotment.window(due)) for due in owner.waiting]
        owner.waiting.clear()
        owner.deliver()
    assert len(group.delivered) == len(dict(group.delivered))
    return dict(group.delivered)


def _check(group: _SimulatedGroup) -> None:
    expected = _expected(group.log)
    for place, digest in group.delivered:
        assert expected[place] == digest, place
    ended = {told.series for told in group.log if isinstance(told, SeriesRemoved)}
    missing = expected.keys() - dict(group.delivered).keys()
    assert all(series in ended for series, _, _ in missing)
    assert group.checkpoint is not None
    assert group.checkpoint.offset == len(group.log)


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_all_is_forecast_from_the_same_bars(seed: int) -> None:
    random = Random(seed)
    group = _SimulatedGroup(_log(random, 400), random)
    asyncio.run(_run_with_rebalances(group, crashes=True))
    _check(group)


@pytest.mark.parametrize("seed", range(60))
def test_handed_over_in_good_order_nothing_is_done_twice(seed: int) -> None:
    random = Random(1_000 + seed)
    group = _SimulatedGroup(_log(random, 400), random)
    asyncio.run(_run_with_rebalances(group, crashes=False))
    _check(group)
    assert len(group.delivered) == len(dict(group.delivered))


async def _run_with_rebalances(group: _SimulatedGroup, *, crashes: bool) -> None:
    random = group.random
    members = [_TrackedMember(group.clock, delivered=group.delivered) for _ in range(3)]
    group.rebalance(members[0])
    for _ in range(60):
        for _ in range(random.randrange(12)):
            group.step()
        if crashes and random.random() < 0.3:
            lost = group.owner
            members = [one for one in members if one is not lost]
            members.append(_TrackedMember(group.clock, delivered=group.delivered))
        else:
            await group.hand_over()
        group.rebalance(random.choice(members))
    group.drain()


async def test_a_member_that_gets_it_back_reads_nothing_again() -> None:
    random = Random(5)
    group = _SimulatedGroup(_log(random, 200), random)
    group.rebalance(_TrackedMember(group.clock, delivered=group.delivered))
    for _ in range(40):
        group.step()
    position = group.position
    assert position > 0
    group.rebalance(await group.hand_over())
    assert group.position == position
    group.drain()
    _check(group)


def test_a_new_member_reads_back_no_more_than_contexts_need() -> None:
    random = Random(6)
    log = [
        RelayedBar(one, Bar(_candle(random, 60_000 * at)), history=at < LOOKBACK)
        for at in range(10 * LOOKBACK)
        for one in SERIES
    ]
    group = _SimulatedGroup(log, random)
    group.rebalance(_TrackedMember(group.clock, delivered=group.delivered))
    group.drain()
    group.rebalance(_TrackedMember(group.clock, delivered=group.delivered))
    assert group.position == len(log) - (LOOKBACK + LATE_BARS) * len(SERIES)


def test_a_series_that_has_died_does_not_hold_the_beginning_back() -> None:
    random = Random(7)
    alive, dead = SERIES[:2]
    log = [
        RelayedBar(one, Bar(_candle(random, 60_000 * at)), history=at < LOOKBACK)
        for at in range(10 * LOOKBACK)
        for one in ((alive, dead) if at < 2 * LOOKBACK else (alive,))
    ]
    group = _SimulatedGroup(log, random)
    group.rebalance(_TrackedMember(group.clock, delivered=group.delivered))
    group.drain()
    group.rebalance(_TrackedMember(group.clock, delivered=group.delivered))
    assert group.position == len(log) - LOOKBACK - LATE_BARS


@pytest.mark.parametrize(("catch_up", "base"), [("all", 100), ("newest", 900)])
def test_where_a_new_group_begins(catch_up: str, base: int) -> None:
    dues: list[ForecastRequest] = []
    allotment = _make_tracker(dues, catch_up=catch_up)
    allotment.on_assigned([PART])
    assert allotment.start_partition(PART, PartitionBounds(100, 900, 700, None)) == min(base, 700)
    bars = [
        RelayedBar(SERIES[0], Bar(_candle(Random(1), 60_000 * at)), history=False)
        for at in range(1_000)
    ]
    allotment.on_records(PART, [(at, bars[at]) for at in range(100, 1_000)], 1_000)
    assert dues[0].origin == 60_000 * base


async def _no_op() -> None:
    pass


def test_two_that_pass_the_same_on_leave_no_bar_out() -> None:
    """The second one has just begun, and calls history what the first one tells as news."""
    dues: list[ForecastRequest] = []
    allotment = _make_tracker(dues)
    allotment.on_assigned([PART])
    allotment.start_partition(PART, PartitionBounds(0, 0, 0, None))
    bar = Bar(_candle(Random(2), 0))
    for at, history in enumerate((True, False, False)):
        allotment.on_records(PART, [(at, RelayedBar(SERIES[0], bar, history))], at + 1)
    assert [due.origin for due in dues] == [0]


@pytest.mark.parametrize(
    "bar",
    [
        Bar(Candle(60_000, 1.0, 2.0, 0.5, 1.5, 3.0, 4.0), 0, received=120_017),
        Bar(Candle(60_000, 1.0, 2.0, 0.5, 1.5, 3.0, None), 3, received=120_017),
        Bar(Candle(60_000, 1.5, 1.5, 1.5, 1.5, 0.0, 0.0), 0, synthetic=True, received=120_017),
        Bar(Candle(60_000, 1.5, 1.5, 1.5, 1.5, 0.0, 0.0), 0, synthetic=True),
    ],
)
def test_bars_are_read_as_they_were_passed_on(bar: Bar) -> None:
    for history in (False, True):
        told = RelayedBar(SERIES[0], bar, history)
        assert decode_bar(encode_bar(*told[:2], history=history), SERIES[0]) == told


async def test_no_more_is_read_while_forecasts_are_not_delivered() -> None:
    random = Random(8)
    log = [
        RelayedBar(SERIES[0], Bar(_candle(random, 60_000 * at)), history=False)
        for at in range(9_000)
    ]
    group = _SimulatedGroup(log, random)
    member = _TrackedMember(group.clock, delivered=group.delivered)
    group.rebalance(member)
    while not member.allotment.paused():
        records = [(at, log[at]) for at in range(group.position, group.position + 100)]
        group.position += 100
        member.allotment.on_records(PART, records, group.position)
        for due in member.waiting:
            member.allotment.mark_published(due, due.origin)
        member.waiting.clear()
    assert group.position == 2_000
    member.allotment.mark_delivered(60_000 * 1_000)
    assert not member.allotment.paused()


def test_history_behind_bars_that_wait_takes_nothing_from_them() -> None:
    """Ingest began anew while the group was behind: whoever gets the part next reads enough."""
    random = Random(9)
    flags = [True] * 60 + [False] * 10 + [True] * 60
    log = [
        RelayedBar(SERIES[0], Bar(_candle(random, 60_000 * at)), history)
        for at, history in enumerate(flags)
    ]
    group = _SimulatedGroup(log, random)
    first = _TrackedMember(group.clock, delivered=group.delivered)
    group.rebalance(first)
    first.allotment.on_records(PART, list(enumerate(log)), len(log))
    group.commit(first)
    group.rebalance(_TrackedMember(group.clock, delivered=group.delivered))
    assert group.position == 60 + 1 - LOOKBACK - LATE_BARS
    group.position = len(log)
    assert group.owner is not None
    group.owner.allotment.on_records(PART, list(enumerate(log)), len(log))
    group.drain()
    assert dict(group.delivered) == _expected(log)


def test_a_note_of_somebody_with_shorter_contexts_is_not_enough() -> None:
    bars = [
        RelayedBar(SERIES[0], Bar(_candle(Random(3), 60_000 * at)), history=False)
        for at in range(99)
    ]
    noted: list[Checkpoint] = []
    for lookback in (8, LOOKBACK):
        allotment = _make_tracker(lookback=lookback)
        allotment.on_assigned([PART])
        note = noted[-1] if noted else None
        begin = allotment.start_partition(PART, PartitionBounds(0, 99, 20, note))
        if note is not None:
            assert note.offset > begin
            assert begin == 20, "where it is young enough for the longer context"
        allotment.on_records(PART, [(at, bars[at]) for at in range(begin, 99)], 99)
        allotment.mark_delivered(0)
        noted.append(allotment.pending_checkpoints()[PART]._replace(offset=99))


def test_what_others_have_got_is_forgotten() -> None:
    other, dues = Partition(PART.log, 4), list[ForecastRequest]()
    allotment = _make_tracker(dues)
    allotment.on_assigned([PART, other])
    for part, one in ((PART, SERIES[0]), (other, SERIES[1])):
        allotment.start_partition(part, PartitionBounds(0, 1, 0, None))
        bar = Bar(_candle(Random(4), 0))
        allotment.on_records(part, [(0, RelayedBar(one, bar, history=False))], 1)
    assert allotment.outstanding_bars(120_000) == 2
    allotment.on_revoked()
    allotment.on_assigned([PART])
    assert allotment.series.keys() == {SERIES[0]}
    assert allotment.outstanding_bars(120_000) == 1
    assert [due.series for due in dues] == SERIES[:2]


@pytest.mark.parametrize(("degraded", "obstacle"), [("skip", "gap"), ("forecast", None)])
def test_bars_that_could_not_be_had_hinder_as_set(degraded: str, obstacle: str | None) -> None:
    dues: list[ForecastRequest] = []
    allotment = _make_tracker(dues, degraded=degraded)
    allotment.on_assigned([PART])
    allotment.start_partition(PART, PartitionBounds(0, 0, 0, None))
    for at in range(LOOKBACK):
        missing = at == LOOKBACK - 3
        bar = Bar(_candle(Random(at), 60_000 * at), synthetic=missing, received=0 if missing else 1)
        told = RelayedBar(SERIES[0], bar, history=at < LOOKBACK - 1)
        allotment.on_records(PART, [(at, told)], at + 1)
    assert [due.skip_reason for due in dues] == [obstacle]


def test_a_log_that_ends_before_what_is_done_is_done_from_there_on() -> None:
    dues: list[ForecastRequest] = []
    allotment = _make_tracker(dues)
    allotment.on_assigned([PART])
    note = Checkpoint(1_000, '{"v":1,"start":900,"bars":40,"done":"1-5"}')
    assert allotment.start_partition(PART, PartitionBounds(0, 10, 0, note)) == 0
    bars = [Bar(_candle(Random(5), 60_000 * at)) for at in range(1_010)]
    records = [(at, RelayedBar(SERIES[0], bar, history=False)) for at, bar in enumerate(bars)]
    allotment.on_records(PART, records, 1_010)
    assert [due.origin for due in dues] == [60_000 * at for at in range(10, 1_010)]


def _make_tracker(dues: list[ForecastRequest] | None = None, **settings: Any) -> PartitionTracker:
    """Whose scheduler does nothing."""
    return PartitionTracker(
        (lambda _: None) if dues is None else dues.append,
        lambda _: None,
        lambda *_: None,
        _no_op,
        ManualClock(10**12),
        Metrics(),
        **{"lookback": LOOKBACK, "catch_up": "all", **settings},
    )


def _two_partitions() -> tuple[PartitionTracker, list[ForecastRequest], list[str]]:
    """Two parts from their beginning, what is due, and why something was refused."""
    dues, reasons = list[ForecastRequest](), list[str]()
    allotment = PartitionTracker(
        dues.append,
        lambda _: None,
        lambda _, reason, __: reasons.append(reason),
        _no_op,
        ManualClock(10**12),
        Metrics(),
        lookback=LOOKBACK,
        catch_up="all",
    )
    parts = [PART, Partition(PART.log, 4)]
    allotment.on_assigned(parts)
    for part in parts:
        allotment.start_partition(part, PartitionBounds(0, 0, 0, None))
    return allotment, dues, reasons


def test_a_bar_off_the_grid_is_refused_and_breaks_no_context() -> None:
    allotment, dues, reasons = _two_partitions()
    times = [60_000 * at for at in range(LOOKBACK)]
    times.insert(-2, times[-2] + 30_000)
    for at, time in enumerate(times):
        told = RelayedBar(SERIES[0], Bar(_candle(Random(at), time)), history=False)
        allotment.on_records(PART, [(at, told)], at + 1)
    assert len(reasons) == 1
    assert "does not go with the bars before it" in reasons[0]
    assert [due.origin for due in dues] == [60_000 * at for at in range(LOOKBACK)]
    assert dues[-1].skip_reason is None


def test_a_series_is_in_one_partition() -> None:
    allotment, dues, reasons = _two_partitions()
    other = Partition(PART.log, 4)
    for at in range(LOOKBACK):
        told = RelayedBar(SERIES[0], Bar(_candle(Random(at), 60_000 * at)), history=False)
        allotment.on_records(PART, [(at, told)], at + 1)
    rogue = RelayedBar(SERIES[0], Bar(_candle(Random(9), 60_000 * LOOKBACK)), history=False)
    allotment.on_records(other, [(0, rogue), (1, SeriesRemoved(SERIES[0]))], 2)
    assert reasons == ["bars of its series are in another partition"] * 2
    allotment.on_records(PART, [(LOOKBACK, rogue)], LOOKBACK + 1)
    assert [due.origin for due in dues] == [60_000 * at for at in range(LOOKBACK + 1)]
    assert dues[-1].skip_reason is None


def test_news_of_bars_that_were_history_to_another_are_due() -> None:
    """The second of two ingesters had just begun, and the first one lags behind it."""
    allotment, dues, _ = _two_partitions()
    told = [(at, at < LOOKBACK) for at in range(LOOKBACK + 2)]
    told += [(at, False) for at in range(LOOKBACK - 2, LOOKBACK + 2)]
    for offset, (at, history) in enumerate(told):
        bar = RelayedBar(SERIES[0], Bar(_candle(Random(at), 60_000 * at)), history)
        allotment.on_records(PART, [(offset, bar)], offset + 1)
    assert sorted(due.origin // 60_000 for due in dues) == [
        LOOKBACK - 2,
        LOOKBACK - 1,
        LOOKBACK,
        LOOKBACK + 1,
    ]
