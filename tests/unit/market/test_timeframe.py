"""Timeframes: parsing, error messages, and the opens of later bars."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronos_stream.market.timeframe import Timeframe

DAY_MS = 86_400_000


def ms(text: str) -> int:
    """UTC milliseconds of an ISO time without zone."""
    return round(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("1s", 1_000),
        ("1m", 60_000),
        ("5m", 300_000),
        ("4h", 14_400_000),
        ("1d", DAY_MS),
        ("1w", 7 * DAY_MS),
        ("1M", None),
    ],
)
def test_parse_and_format(text: str, milliseconds: int | None) -> None:
    timeframe = Timeframe.parse(text)
    assert timeframe.milliseconds == milliseconds
    assert str(timeframe) == text


@pytest.mark.parametrize(
    "text", ["", "m", "5", "0m", "05m", "-5m", "5 m", "5m ", "5min", "5y", "5H", "1.5h", "m5", "٣m"]
)
def test_invalid_text_is_quoted_in_the_error(text: str) -> None:
    with pytest.raises(ValueError, match="expected a count and a unit") as caught:
        Timeframe.parse(text)
    assert repr(text) in str(caught.value)
    assert "5m" in str(caught.value)


@pytest.mark.parametrize(
    ("step", "text"),
    [(1_000, "1s"), (90_000, "90s"), (300_000, "5m"), (3_600_000, "1h"), (7 * DAY_MS, "1w")],
)
def test_from_step_uses_the_largest_unit(step: int, text: str) -> None:
    assert str(Timeframe.from_step(step)) == text


@pytest.mark.parametrize("step", [0, -60_000, 999, 1_500])
def test_step_without_a_timeframe_is_named_in_the_error(step: int) -> None:
    with pytest.raises(ValueError, match=f"{step} ms"):
        Timeframe.from_step(step)


@pytest.mark.parametrize("text", ["1s", "5m", "4h", "1d", "1w"])
def test_after_is_linear_for_fixed_units(text: str) -> None:
    timeframe, start = Timeframe.parse(text), ms("2024-02-28T23:59:59")
    length = timeframe.milliseconds
    assert length is not None
    assert [timeframe.after(start, n) for n in (-1, 0, 1, 500)] == [
        start - length,
        start,
        start + length,
        start + 500 * length,
    ]


@pytest.mark.parametrize(
    ("text", "opened", "bars", "wanted"),
    [
        ("1M", "2024-01-01", 1, "2024-02-01"),
        ("1M", "2024-12-01", 1, "2025-01-01"),
        ("1M", "2024-11-01", 14, "2026-01-01"),
        ("1M", "2025-01-01", -1, "2024-12-01"),
        ("3M", "2024-10-01", 1, "2025-01-01"),
        ("12M", "2024-02-01", 1, "2025-02-01"),
        # East of Greenwich a month opens on the evening of the last day of the month before.
        ("1M", "2024-12-31T16:00", 1, "2025-01-31T16:00"),
        ("1M", "2025-01-31T16:00", 1, "2025-02-28T16:00"),
        ("1M", "2024-01-31T16:00", 1, "2024-02-29T16:00"),
        ("1M", "2025-02-28T16:00", 1, "2025-03-31T16:00"),
        ("1M", "2025-04-30T16:00", 8, "2025-12-31T16:00"),
        # Other days stay, or become the last day if the month is shorter.
        ("1M", "2025-01-15T08:30", 1, "2025-02-15T08:30"),
        ("1M", "2025-01-30", 1, "2025-02-28"),
        ("1M", "1969-12-01", 1, "1970-01-01"),
    ],
)
def test_after_follows_the_calendar_for_months(
    text: str, opened: str, bars: int, wanted: str
) -> None:
    assert Timeframe.parse(text).after(ms(opened), bars) == ms(wanted)


@given(
    opened=st.integers(ms("1971-01-01"), ms("2090-01-01")),
    count=st.integers(1, 12),
    bars=st.integers(0, 60),
)
def test_each_later_month_opens_later_at_the_same_time_of_day(
    opened: int, count: int, bars: int
) -> None:
    timeframe = Timeframe(count, "M")
    here, there = timeframe.after(opened, bars), timeframe.after(opened, bars + 1)
    assert timeframe.after(opened, 0) == opened
    assert 28 * DAY_MS * count <= there - here <= 31 * DAY_MS * count
    assert there % DAY_MS == opened % DAY_MS


@given(
    opened=st.integers(ms("1991-01-01"), ms("2090-01-01")),
    text=st.sampled_from(["1m", "4h", "1d", "1w", "1M", "3M"]),
    bars=st.integers(-60, 60),
)
def test_has_open_finds_every_bar_from_any_anchor(opened: int, text: str, bars: int) -> None:
    timeframe = Timeframe.parse(text)
    opened -= opened % 60_000
    if timeframe.milliseconds is None:  # a month that lacks the day would shift later bars
        opened = ms(f"{1991 + opened % 100}-{1 + opened // DAY_MS % 12:02}-01") + opened % DAY_MS
    other = timeframe.after(opened, bars)
    assert timeframe.has_open(other, opened)
    assert not timeframe.has_open(other + 1, opened)
    if bars > 0:
        assert timeframe.bars_between(opened, other) == bars
        assert timeframe.bars_between(opened, other - 1) == bars - 1


@pytest.mark.parametrize(
    ("text", "time", "anchor", "expected"),
    [
        ("5m", ms("2024-01-01T00:05"), None, True),
        ("5m", ms("2024-01-01T00:06"), None, False),
        ("5m", -300_000, None, False),
        ("1d", ms("2024-01-01T16:00"), None, True),
        ("1d", ms("2024-01-01T16:00"), ms("2024-01-05"), False),
        ("1M", ms("2024-02-01"), ms("2025-12-01"), True),
        ("1M", ms("2024-02-02"), ms("2025-12-01"), False),
    ],
)
def test_has_open(text: str, time: int, anchor: int | None, expected: bool) -> None:  # noqa: FBT001
    assert Timeframe.parse(text).has_open(time, anchor) == expected
