"""Checks of candle records, shared by the source and the feed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from kronos_stream.interfaces.feed import Partition, Unreadable
from kronos_stream.market.candle_message import CandleMessageError
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe


class CandleRecord(Protocol):
    """The fields of a consumed record that are used."""

    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes]]: ...


@lru_cache(maxsize=65_536)
def series_of_key(key: bytes) -> Series | None:
    """The series that a key names, None for any other key."""
    try:
        return Series.parse(key.decode())
    except ValueError:
        return None


def check_timeframe(series: Series, timeframe: Timeframe) -> None:
    """Raise CandleMessageError if ``series`` has another timeframe than its topic."""
    if series.timeframe != timeframe:
        raise CandleMessageError(f"{series} in the topic for {timeframe} candles", series)


def oldest_timestamp(timeframe: Timeframe, bars: int, now: int) -> int:
    """Creation time of the oldest record within ``bars`` of ``now``, UTC ms.

    A record is created when its bar closes, or later.
    """
    return max(0, timeframe.after(now, -bars))


def unreadable(partition: Partition, record: CandleRecord, error: CandleMessageError) -> Unreadable:
    """The rejection of an invalid record, with its place."""
    reason = f"{partition.log}[{partition.number}]@{record.offset}: {error}"
    return Unreadable(error.series, reason, record.value or b"")
