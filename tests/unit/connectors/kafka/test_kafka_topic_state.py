"""What records of candle topics mean, without a broker: history, news, and the partitions' ways."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest

from kronos_connectors.kafka.topic_state import (
    DecodedRecord,
    InvalidRecord,
    Partition,
    PartitionBounds,
    TopicState,
)
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.candle_message import encode_candle
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

MINUTE = 60_000
START = 1_718_709_300_000
NOW = START + 10_000 * MINUTE
TOPIC = "kronos.candles.1m.v1"
PLACE = Partition(TOPIC, 0)
BTC, ETH = (Series.parse(f"kafka:{base}/USDT:1m") for base in ("BTC", "ETH"))
FIVE = Series.parse("kafka:BTC/USDT:5m")


@dataclass(frozen=True)
class Record:
    """As a consumer gives it."""

    offset: int
    key: bytes | None
    value: bytes | None


def _candle(minute: int, close: float = 1.0) -> Candle:
    return Candle(START + minute * MINUTE, close, close, close, close, 1.0)


def _record(offset: int, minute: int, close: float = 1.0, series: Series = BTC) -> Record:
    return Record(offset, series.name.encode(), encode_candle(series, _candle(minute, close)))


def _reading(*series: Series, bars: int = 1_000) -> TopicState:
    reading = TopicState("kronos", bars)
    reading.follow(series or (BTC,))
    return reading


def _placed(reading: TopicState, end: int = 0, committed: int | None = None) -> TopicState:
    """Its only partition begins with offset 0."""
    reading.on_assigned([PLACE], {TOPIC: 1})
    assert reading.begin(PLACE, PartitionBounds(0, end, 0, committed)) == 0
    return reading


def _minutes(told: list[DecodedRecord]) -> list[int]:
    return [(one.candle.time - START) // MINUTE for one in told if isinstance(one, Update)]


def _history(reading: TopicState, series: Series = BTC) -> list[tuple[int, float]]:
    return [
        ((candle.time - START) // MINUTE, candle.close)
        for candle in reading.history(series, 0, NOW, NOW)
    ]


def test_what_was_there_is_history_and_what_comes_is_news() -> None:
    reading = _placed(_reading(), end=3)
    assert "3 records" in reading.unavailable_reason(BTC, "g")
    assert _minutes(reading.read(PLACE, [_record(i, i) for i in range(5)], NOW)) == [3, 4]
    assert reading.unavailable_reason(BTC, "g") == ""
    assert [minute for minute, _ in _history(reading)] == [0, 1, 2, 3, 4]
    assert reading.offsets_to_commit() == {PLACE: 5}


def test_records_that_came_before_it_was_known_where_to_begin_are_not_taken() -> None:
    reading = _reading()
    assert reading.read(PLACE, [_record(7, 7)], NOW) == []
    reading.on_assigned([PLACE], {TOPIC: 1})
    assert reading.read(PLACE, [_record(7, 7)], NOW) == []
    assert "not ours yet" in reading.unavailable_reason(BTC, "g")
    _placed(reading)
    assert _minutes(reading.read(PLACE, [_record(0, 0)], NOW)) == [0]


def test_a_bar_said_twice_is_passed_on_twice_and_stands_as_it_was_said_last() -> None:
    reading = _placed(_reading())
    records = [_record(0, 0), _record(1, 2), _record(2, 1), _record(3, 2, 5.0), _record(4, 0)]
    assert _minutes(reading.read(PLACE, records, NOW)) == [0, 2, 1, 2, 0]
    assert _history(reading) == [(0, 1.0), (1, 1.0), (2, 5.0)]


def test_other_series_are_not_even_decoded() -> None:
    reading = _placed(_reading())
    assert reading.read(PLACE, [Record(0, ETH.name.encode(), b"{"), _record(1, 1)], NOW)[0] == (
        Update(BTC, _candle(1), closed=True, received=NOW)
    )
    assert reading.read(PLACE, [Record(2, None, encode_candle(ETH, _candle(1)))], NOW) == []


@pytest.mark.parametrize(
    ("key", "value", "series", "said"),
    [
        (BTC.name.encode(), b"{", BTC, "Invalid JSON"),
        (BTC.name.encode(), None, BTC, "without a value"),
        (
            BTC.name.encode(),
            encode_candle(ETH, _candle(0)),
            BTC,
            "the message names series kafka:ETH/USDT:1m",
        ),
        (BTC.name.encode(), encode_candle(BTC, _candle(0, -1.0)), BTC, "is not a price"),
        (None, b"{}", None, "required"),
        (
            b"BTC",
            encode_candle(BTC, _candle(0)).replace(BTC.name.encode(), b"BTC"),
            None,
            "series 'BTC'",
        ),
        (FIVE.name.encode(), b"{}", FIVE, "among those of 1m"),
        (
            None,
            encode_candle(FIVE, Candle(START, 1.0, 1.0, 1.0, 1.0, 1.0)),
            FIVE,
            "among those of 1m",
        ),
    ],
)
def test_what_cannot_be_is_rejected_with_its_place(
    key: bytes | None, value: bytes | None, series: Series | None, said: str
) -> None:
    reading = _placed(_reading())
    told = reading.read(PLACE, [Record(0, key, value), _record(1, 1)], NOW)
    assert isinstance(told[0], InvalidRecord)
    assert (told[0].series, told[0].raw) == (series, value or b"")
    assert told[0].reason.startswith(f"{TOPIC}[0]@0: ")
    assert said in told[0].reason
    assert _minutes(told) == [1]
    assert [minute for minute, _ in _history(reading)] == [1]


def test_a_key_that_is_no_series_leaves_it_to_the_message() -> None:
    reading = _placed(_reading())
    told = reading.read(PLACE, [Record(0, b"BTC", encode_candle(BTC, _candle(0)))], NOW)
    assert _minutes(told) == [0]


def test_records_that_the_group_has_judged_are_not_rejected_again() -> None:
    bad = [Record(offset, BTC.name.encode(), b"{") for offset in range(4)]
    assert len(_placed(_reading(), end=4, committed=3).read(PLACE, bad, NOW)) == 1
    assert len(_placed(_reading(), end=4).read(PLACE, bad, NOW)) == 4
    # A topic made anew has fewer than were committed.
    assert len(_placed(_reading(), end=4, committed=9).read(PLACE, bad, NOW)) == 4
    reading = _placed(_reading(BTC))
    assert len(reading.read(PLACE, bad, NOW)) == 4
    assert reading.read(PLACE, bad, NOW) == []
    reading.follow([BTC, ETH])  # they are read once more for its sake
    assert reading.begin(PLACE, PartitionBounds(0, 4, 0, None)) == 0
    assert reading.read(PLACE, bad, NOW) == []


def test_an_open_bar_is_a_sign_of_life_and_no_history() -> None:
    reading = _placed(_reading())
    value = encode_candle(BTC, _candle(0), closed=False)
    told = reading.read(PLACE, [Record(0, BTC.name.encode(), value)], NOW)
    assert told == [Update(BTC, _candle(0), closed=False, received=NOW)]
    assert _history(reading) == []


def test_bars_of_the_future_do_not_crowd_out_what_is_real() -> None:
    reading = _placed(_reading(bars=3))
    reading.read(PLACE, [_record(minute, minute) for minute in range(3)], START + 3 * MINUTE)
    reading.read(PLACE, [_record(3 + i, 900 + i) for i in range(9)], START + 3 * MINUTE)
    assert [minute for minute, _ in _history(reading)] == [0, 1, 2]
    # Said to be closed, and not closed yet by our clock.
    assert not reading.history(BTC, START + 2 * MINUTE, NOW, START + 3 * MINUTE - 1)
    assert reading.history(BTC, START + 2 * MINUTE, NOW, START + 3 * MINUTE)


def test_what_is_read_back_is_bounded_by_time_and_number() -> None:
    reading = _reading(bars=10)
    assert reading.oldest_timestamp(PLACE, NOW) == NOW - 10 * MINUTE
    reading.on_assigned([PLACE], {TOPIC: 1})
    assert reading.begin(PLACE, PartitionBounds(5, 100, 40, None)) == 40
    for since, end, start in ((None, 100, 5), (2, 100, 5), (0, 3_000_000, 2_000_000)):
        reading = _reading(bars=10)
        reading.on_assigned([PLACE], {TOPIC: 1})
        assert reading.begin(PLACE, PartitionBounds(5, end, since, None)) == start
    months = Series.of("kafka", "BTC/USDT", Timeframe(1, "M"))
    assert _reading(months).oldest_timestamp(Partition("kronos.candles.1M.v1", 0), NOW) == 0


def test_a_partition_that_comes_back_goes_on_where_it_was() -> None:
    reading = _placed(_reading())
    reading.read(PLACE, [_record(0, 0), _record(1, 1)], NOW)
    reading.on_revoked([PLACE])
    reading.on_assigned([PLACE], {TOPIC: 1})
    assert reading.begin(PLACE, PartitionBounds(0, 4, 1, 9)) == 2
    assert _minutes(reading.read(PLACE, [_record(2, 2), _record(3, 3)], NOW)) == [2, 3]
    assert reading.unavailable_reason(BTC, "g") == ""


def test_a_partition_that_was_long_away_is_read_back_as_if_it_were_new() -> None:
    reading = _placed(_reading())
    reading.read(PLACE, [_record(0, 0)], NOW)
    reading.on_lost()
    reading.on_assigned([PLACE], {TOPIC: 1})
    assert reading.begin(PLACE, PartitionBounds(0, 5_000, 4_000, 1)) == 4_000
    assert reading.read(PLACE, [_record(4_000, 4_000)], NOW) == []


def test_a_new_series_has_its_past_read_and_the_others_nothing_twice() -> None:
    reading = _placed(_reading())
    records = [_record(i, i, series=(BTC, ETH)[i % 2]) for i in range(6)]
    assert _minutes(reading.read(PLACE, records, NOW)) == [0, 2, 4]
    reading.follow([BTC, ETH])
    assert reading.pending == {PLACE}
    assert reading.begin(PLACE, PartitionBounds(0, 7, 0, None)) == 0
    records.append(_record(6, 6, series=ETH))
    assert _minutes(reading.read(PLACE, records, NOW)) == [6]
    assert [minute for minute, _ in _history(reading, ETH)] == [1, 3, 5, 6]
    assert reading.offsets_to_commit() == {PLACE: 7}
    reading.follow([ETH])  # nothing is read for one that goes
    assert not reading.pending
    assert _history(reading) == []


def test_a_topic_dropped_and_taken_up_again_is_read_back() -> None:
    reading = _placed(_reading())
    reading.read(PLACE, [_record(0, 0)], NOW)
    reading.follow([])
    assert reading.topics == frozenset()
    reading.on_revoked([PLACE])
    reading.follow([BTC])
    _placed(reading, end=1)
    reading.read(PLACE, [_record(0, 0)], NOW)
    assert _history(reading) == [(0, 1.0)]


def test_a_series_in_another_members_partition_is_said_to_be_there() -> None:
    reading = _reading(BTC, ETH)
    reading.on_assigned([PLACE], {TOPIC: 2})
    reading.begin(PLACE, PartitionBounds(0, 1, 0, None))
    reading.read(PLACE, [_record(0, 0)], NOW)
    assert reading.unavailable_reason(BTC, "g") == ""  # we have seen it in ours
    assert "1 of its 2 partitions are ours" in reading.unavailable_reason(ETH, "g")
    assert reading.shared_topics == [TOPIC]
    other = Partition(TOPIC, 1)
    reading.on_assigned([PLACE, other], {TOPIC: 2})
    assert reading.pending == {other}
    reading.begin(other, PartitionBounds(0, 0, 0, None))
    assert reading.unavailable_reason(ETH, "g") == ""
    assert reading.shared_topics == []


def test_offsets_without_records_are_nothing_to_wait_for() -> None:
    reading = _placed(_reading(), end=2)
    reading.read(PLACE, [_record(0, 0)], NOW)
    assert reading.catching_up == [PLACE]
    reading.advance(PLACE, 2)  # the mark of a transaction's end
    assert reading.unavailable_reason(BTC, "g") == ""
    reading.on_committed(reading.offsets_to_commit())
    assert reading.offsets_to_commit() == {}


@pytest.mark.parametrize("seed", range(200))
def test_whatever_the_group_does_nothing_is_lost_or_told_twice(seed: int) -> None:
    """One partition, records of two series, and a group that takes and gives it at any moment."""
    random = Random(seed)
    log: list[Record] = []
    reading = _reading(BTC)
    told: list[DecodedRecord] = []
    truth: dict[int, float] = {}
    position, first_end, others = 0, -1, False
    for _ in range(random.randrange(20, 120)):
        action = random.randrange(8)
        if action < 3:
            series = random.choice((BTC, ETH))
            minute, close = random.randrange(50), float(random.randrange(1, 9))
            if series == BTC:
                truth[minute] = close
            log.append(_record(len(log), minute, close, series))
        elif action < 6:
            batch = log[position : position + random.randrange(5)]
            if PLACE in reading._active:
                position += len(batch)
            told += reading.read(PLACE, batch, NOW)
        elif action == 6:
            others = not others
            reading.follow([BTC, ETH] if others else [BTC])
        else:
            reading.on_revoked([PLACE])
            reading.on_assigned([PLACE], {TOPIC: 1})
        if reading.pending and random.random() < 0.7:
            first_end = len(log) if first_end < 0 else first_end
            position = reading.begin(PLACE, PartitionBounds(0, len(log), 0, None))
    if reading.pending or not reading._active:
        reading.on_assigned([PLACE], {TOPIC: 1})
        first_end = len(log) if first_end < 0 else first_end
        position = reading.begin(PLACE, PartitionBounds(0, len(log), 0, None))
    told += reading.read(PLACE, log[position:], NOW)

    assert reading.unavailable_reason(BTC, "g") == ""
    assert _history(reading) == sorted(truth.items())
    expected = [record for record in log[first_end:] if record.key == BTC.name.encode()]
    mine = [one for one in told if isinstance(one, Update) and one.series == BTC]
    assert [encode_candle(BTC, one.candle) for one in mine] == [record.value for record in expected]
