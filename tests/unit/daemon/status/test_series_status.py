"""Status of series: rows, states, silent venues, latest forecasts."""

from __future__ import annotations

from typing import Any

import pytest

from kronos_stream.daemon.status import series as series_module
from kronos_stream.daemon.status.series import LATE_MS
from kronos_stream.market.candle import Candle
from kronos_stream.market.clock import ManualClock
from kronos_stream.market.series import Series
from tests.support.status_harness import BTC, MINUTE, START, StatusHarness, TrackedSeries
from tests.support.status_harness import make_sequencer as sequencer_of


def _row(harness: StatusHarness) -> dict[str, Any]:
    (row,) = harness.registry.rows()
    return dict(row)


def _error(harness: StatusHarness, name: str) -> str:
    with pytest.raises(LookupError) as raised:
        harness.registry.latest_forecast(name)
    return str(raised.value.args[0])


def test_row_has_last_bar_outcome_and_forecast() -> None:
    harness = StatusHarness(BTC.name)
    assert _row(harness) == {
        "series": BTC.name,
        "state": "live",
        "last_bar": {
            "open_time": "2024-06-18T11:59:00Z", "close": 1.5, "revision": 0, "synthetic": False,
        },
        "next_due": "2024-06-18T12:01:00Z",
        "held": 0,
        "owed": 0,
        "last_outcome": None,
        "last_forecast": None,
    }  # fmt: skip
    harness.record()
    row = _row(harness)
    outcome = {"origin": "2024-06-18T11:59:00Z", "revision": 1, "result": "forecast"}
    assert row["last_outcome"] == {**outcome, "reason": None}
    assert row["last_forecast"] == {
        "origin": "2024-06-18T11:59:00Z",
        "revision": 1,
        "degraded": True,
        "reasons": ("1 synthetic bar",),
        "latency_ms": {"close_to_received": 250, "queued": 12, "compute": 34},
    }
    harness.record(reason="overrun")
    later = _row(harness)
    assert later["last_outcome"] == {**outcome, "result": "skipped", "reason": "overrun"}
    assert later["last_forecast"] == row["last_forecast"]


def test_state_names_the_problem_of_a_series() -> None:
    harness = StatusHarness(BTC.name)
    sequencer = harness.tracked[BTC].sequencer
    for ahead in (2, 3):  # the bar at START is missing
        candle = Candle(START + ahead * MINUTE, 1, 2, 0.5, 1.5, 10, 15)
        harness.clock.advance(candle.time + MINUTE)
        sequencer.update(candle, True, harness.clock.now())  # noqa: FBT003
    row = _row(harness)
    assert (row["state"], row["held"]) == ("late", 2)
    harness.registry._clock = ManualClock(START + 2 * MINUTE - 1)
    assert _row(harness)["state"] == "held"
    sequencer.silent = True
    assert _row(harness)["state"] == "silent"
    harness.tracked[BTC] = TrackedSeries(sequencer_of(BTC, bars=0))
    row = _row(harness)
    assert (row["state"], row["last_bar"], row["next_due"]) == ("starting", None, None)


def test_venue_is_silent_if_all_its_series_are() -> None:
    first, second = (f"binance:{name}/USDT:1m" for name in ("A", "B"))
    harness = StatusHarness(first, second, "kraken:A/USD:1m")
    venues = ("binance", "kraken", "without series")
    silent = harness.registry.silent_venues
    assert silent(venues) == {}
    harness.tracked[Series.parse(first)].sequencer.silent = True
    assert silent(venues) == {}
    harness.tracked[Series.parse(second)].sequencer.silent = True
    assert silent(venues) == {"binance": "no data for any of its 2 series"}
    harness.clock.advance(START + MINUTE + LATE_MS)
    assert set(silent(venues)) == {"binance"}
    harness.clock.advance(START + MINUTE + LATE_MS + 1)  # now the bar of kraken is late, too
    assert set(silent(venues)) == {"binance", "kraken"}


def test_missing_forecast_is_explained() -> None:
    harness = StatusHarness(BTC.name)
    assert "no bar has closed" in _error(harness, BTC.name)
    for unknown in ("binance:ETH/USDT:1m", "nonsense", "", "\ufffd", "a" * 10_000):
        assert "is not followed; /series lists" in _error(harness, unknown)
    harness.record(reason="warming up")
    assert "not forecast (warming up)" in _error(harness, BTC.name)
    harness.record()
    assert harness.registry.latest_forecast(BTC.name) == b"{}"
    del harness.tracked[BTC]
    assert "is not followed" in _error(harness, BTC.name)


def test_forecasts_in_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series_module, "MAX_BYTES", 2_500)
    a, b, c = series = [Series.parse(f"binance:{name}/USDT:1m") for name in "ABC"]
    harness = StatusHarness(*(one.name for one in series))
    for updated in (a, b, c, a, c):
        harness.record(updated, body=b"x" * 1_000)
    assert harness.registry.latest_forecast(a.name)
    assert "not in memory any more" in _error(harness, b.name)
    assert harness.registry.latest_forecast(c.name)
    # Series that are not followed any more are removed with the next result.
    del harness.tracked[a], harness.tracked[b]
    harness.record(c, body=b"y")
    registry = harness.registry
    assert registry._bytes == 1
    assert set(registry._latest) == set(registry._messages) == {c.name}
