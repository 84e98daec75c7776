"""State of a single connection to Binance."""

from __future__ import annotations

import pytest

from kronos_connectors._shared.rotating_pool import NEVER
from kronos_connectors.binance.connection import RESPONSE_TIMEOUT_SECONDS, Connection
from kronos_connectors.binance.frames import Response
from tests.support.binance_venue import (
    LIFE,
    STALL,
)


def test_unopened_connection_sends_nothing() -> None:
    one = Connection(stall_seconds=STALL, lifetime_seconds=LIFE)
    one.assign({"a"}, 60)
    assert one.next_request(0) is None
    assert one.next_wakeup(0) == NEVER
    assert one.failure(1e9) == ""
    assert not one.expired(1e9)


def test_next_wakeup_is_the_earliest_deadline() -> None:
    one = Connection(stall_seconds=STALL, lifetime_seconds=LIFE)
    one.assign({"a"}, 80)
    one.on_opened(100)
    assert one.next_request(100) is not None
    assert one.next_wakeup(100) == pytest.approx(100.35)  # when it may speak again
    assert one.next_wakeup(101) == 100 + RESPONSE_TIMEOUT_SECONDS
    one.on_response(Response(1, ""), 101)
    one.on_activity(101)
    assert one.next_wakeup(101) == 101 + STALL
    one.on_candle(120)
    assert one.next_wakeup(150) == 200
    assert one.next_wakeup(1_000) == 100 + LIFE
