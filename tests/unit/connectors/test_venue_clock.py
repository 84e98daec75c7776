"""Offset of a venue's clock."""

from __future__ import annotations

import pytest

from kronos_connectors._shared.venue_clock import VenueClock

START = 1_750_000_020_000


def test_lower_bound_is_never_after_the_venues_time() -> None:
    clock = VenueClock()
    assert clock.needs_update(START, 0.0)
    clock.update(START, START + 5_000, START + 400, 10.0)  # measured at some time in these 400 ms
    assert clock.offset == 4_800
    for measured_at in (START, START + 400):
        venue_is_ahead = START + 5_000 - measured_at
        for later in (400, 30_000, 59_000):
            for drift in (-0.0004, 0.0004):
                there = START + later + venue_is_ahead + drift * later
                assert there - 470 <= clock.lower_bound(START + later) <= there


@pytest.mark.parametrize(
    ("now", "uptime", "stale"),
    [
        (30_000, 40.0, False),
        (61_000, 71.0, True),
        (30_000, 11.0, True),  # set forward
        (1_000, 40.0, True),  # set back a little
        (-5_000, 15.0, True),
    ],
)
def test_offset_is_measured_again_when_old_or_when_our_clock_was_set(
    now: int,
    uptime: float,
    stale: bool,  # noqa: FBT001
) -> None:
    clock = VenueClock()
    clock.update(START, START, START, 10.0)
    assert clock.needs_update(START + now, uptime) is stale
