"""The daemon at full load and overloaded: outcomes stay complete and correct."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable

import pytest

from tests.support.apache_kafka import ApacheKafka
from tests.support.daemon_process import DaemonProcess, p99
from tests.support.exchange_process import ExchangeProcess
from tests.support.forecast_audit import audit_forecasts, read_topic
from tests.support.processes import wait_for

SOAK_SECONDS = float(os.environ.get("KRONOS_SOAK_LOAD_SECONDS", "600"))
LAG_SECONDS = 0.05
RECEIVED_SECONDS = 0.5
"""Time to receive bars that close together, including the time of the exchange."""
GROWTH_MIB = 64.0
"""Growth allowed from the first third to the end."""


@pytest.mark.parametrize(
    ("symbols", "timeframe", "seconds", "keeps_up", "timed"),
    [
        pytest.param(100, "1s", 9.0, False, False, id="short"),
        pytest.param(
            300, "10s", SOAK_SECONDS, True, True,
            id="300x10s", marks=[pytest.mark.soak, pytest.mark.timeout(SOAK_SECONDS + 600)],
        ),
        pytest.param(
            1_000, "1s", SOAK_SECONDS, False, True,
            id="1000x1s", marks=[pytest.mark.soak, pytest.mark.timeout(SOAK_SECONDS + 600)],
        ),
    ],
)  # fmt: skip
def test_outcomes_are_complete_and_correct(
    symbols: int,
    timeframe: str,
    seconds: float,
    keeps_up: bool,  # noqa: FBT001
    timed: bool,  # noqa: FBT001
    kafka: ApacheKafka,
    topic_prefix: str,
    make_daemon: Callable[..., DaemonProcess],
) -> None:
    arguments = ["--symbols", str(symbols), "--timeframe", timeframe, "--history", "120"]
    with ExchangeProcess(*arguments) as exchange, make_daemon(exchange, kafka.bootstrap) as daemon:
        daemon.start()
        daemon.wait_until_ready()
        wait_for("forecasts", lambda: daemon.metric("kronos_delivered_total") >= symbols)
        began = time.monotonic()
        time.sleep(seconds / 3)
        before, early = daemon.metrics(), daemon.resident_mib()
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        after, late = daemon.metrics(), daemon.resident_mib()
        assert daemon.stop() == 0
        decided = daemon.outcome_range(exchange.series())
        outcomes = daemon.outcomes(exchange.series())
        due = {series: exchange.closed_bar_times(series, *span) for series, span in decided.items()}
    results = Counter(one.reason or one.result for some in outcomes.values() for one in some)
    lag, received, published = (
        p99(f"kronos_{name}_seconds", before, after)
        for name in ("event_loop_lag", "close_to_received", "received_to_published")
    )
    print(  # noqa: T201
        f"{symbols} series of {timeframe}, {seconds:g} s: {dict(results)}; p99 of loop lag "
        f"{1000 * lag:g} ms, close to received {1000 * received:g} ms, received to published "
        f"{1000 * published:g} ms at most; {early:.0f} → {late:.0f} MiB"
    )
    assert len(due) == symbols
    for series, opens in due.items():
        assert [one.origin for one in outcomes[series]] == opens, series
    records = read_topic(kafka.bootstrap, f"{topic_prefix}.forecasts.v1")
    forecast = {
        series: [one.origin for one in some if one.result == "forecast"]
        for series, some in outcomes.items()
    }
    found = audit_forecasts(records, forecast)
    assert found.problems == []
    assert found.records - found.duplicates == sum(map(len, forecast.values()))
    # Stale bars arrived late themselves: the last of the history at the start.
    assert set(results) <= ({"forecast"} if keeps_up else {"forecast", "overrun", "stale"})
    assert late - early < GROWTH_MIB
    if timed:
        assert received <= RECEIVED_SECONDS
        assert lag <= LAG_SECONDS
