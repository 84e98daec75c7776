"""Ingest and a group of forecast daemons on Kafka, while members are killed, added and stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest

from kronos_connectors.kafka.topics import candle_topic, forecast_topic
from kronos_stream.forecast.message import FORECAST, REMOVAL
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.utc import parse_time
from tests.support.apache_kafka import ApacheKafka
from tests.support.daemon_process import DaemonProcess
from tests.support.forecast_audit import AuditReport, audit_forecasts, read_topic
from tests.support.forecast_group import ForecastGroup, TopicListener, forecast_group
from tests.support.processes import wait_for

SECOND = Timeframe.parse("1s")


def _run_group(
    group: ForecastGroup, *, rounds: int, seconds: float, seed: int
) -> tuple[AuditReport, list[float]]:
    """Kill and add a member ``rounds`` times within ``seconds``; then let the group finish."""
    random = Random(seed)
    ingest = group.ingest()
    for _ in range(3):
        group.join()
    for member in group.members:
        member.wait_until_ready()
    listener = TopicListener(group.bootstrap, forecast_topic(group.prefix))
    try:
        began, caught_up = time.monotonic(), []
        for number in range(rounds):
            at = group.kill(random.choice(group.members))
            group.join()
            if number % 2 == 0:
                ingest.kill()
                ingest.start()
            time.sleep(max(0, began + (number + 1) * seconds / rounds - time.monotonic()))
            caught_up.append(listener.caught_up(at))
        assert ingest.stop() == 0
        wait_for("everything is read", lambda: group.lag() == 0, interval=0.5)
        for member in [*group.members]:
            assert group.stop(member) == 0
    finally:
        listener.close()
    return group.audit(), caught_up


def test_every_bar_is_forecast_although_members_and_ingest_are_killed(
    kafka: ApacheKafka, topic_prefix: str, tmp_path: Path
) -> None:
    with forecast_group(kafka, topic_prefix, tmp_path, symbols=6) as group:
        report, caught_up = _run_group(group, rounds=1, seconds=24, seed=1)
    print(f"\n{report.records} forecasts, {report.duplicates} repeated; late for {caught_up} s")  # noqa: T201
    assert not report.problems
    assert report.records > 6 * 15


def test_rolling_restart_causes_no_duplicates(
    kafka: ApacheKafka, topic_prefix: str, tmp_path: Path
) -> None:
    """Members are replaced one by one while they have more work than they can do."""
    with forecast_group(kafka, topic_prefix, tmp_path, symbols=8) as group:
        ingest = group.ingest()
        for _ in range(2):
            group.join(seconds_per_forecast=0.15)
        for _ in range(2):
            group.members[-1].wait_until_ready()
            group.join(seconds_per_forecast=0.15)
            time.sleep(2)
            assert group.stop(group.members[0]) == 0
        assert ingest.stop() == 0
        group.join(seconds_per_forecast=0.005)
        wait_for("everything is read", lambda: group.lag() == 0, interval=0.5)
        for member in [*group.members]:
            member.wait_until_ready()
            wait_for("its queue is empty", partial(_has_no_bars_due, member))
            assert group.stop(member) == 0
        report = group.audit()
    print(f"\n{report.records} forecasts, {report.duplicates} duplicates")  # noqa: T201
    assert not report.problems
    assert report.duplicates == 0


def _has_no_bars_due(member: DaemonProcess) -> bool:
    return member.metric("kronos_queue_depth", queue="due") == 0


@pytest.mark.soak
def test_sixty_series_with_two_kills_in_three_minutes(
    kafka: ApacheKafka, topic_prefix: str, tmp_path: Path
) -> None:
    with forecast_group(kafka, topic_prefix, tmp_path, symbols=60) as group:
        report, caught_up = _run_group(group, rounds=2, seconds=180, seed=2)
    print(f"\n{report.records} forecasts, {report.duplicates} repeated; late for {caught_up} s")  # noqa: T201
    assert not report.problems
    assert report.records > 60 * 150


@pytest.mark.soak
def test_broker_outages_cost_no_bar(kafka_jars: Path, topic_prefix: str, tmp_path: Path) -> None:
    with (
        ApacheKafka(kafka_jars, tmp_path / "kafka") as broker,
        forecast_group(broker, topic_prefix, tmp_path, symbols=6) as group,
    ):
        ingest = group.ingest()
        for _ in range(2):
            group.join()
        for member in group.members:
            member.wait_until_ready()
        for seconds in (3, 25):
            broker.kill()
            time.sleep(seconds)
            assert all(member.readiness()[0] == 503 for member in group.members) or seconds < 25
            broker.start()
            for member in group.members:
                member.wait_until_ready()
            time.sleep(10)
        assert ingest.stop() == 0
        wait_for("everything is read", lambda: group.lag() == 0, interval=0.5)
        for member in [*group.members]:
            assert group.stop(member) == 0
        report = group.audit()
    print(f"\n{report.records} forecasts, {report.duplicates} duplicates")  # noqa: T201
    assert not report.problems
    assert report.records > 6 * 50


def test_removed_series_is_announced_to_readers(
    kafka: ApacheKafka, topic_prefix: str, tmp_path: Path
) -> None:
    with forecast_group(kafka, topic_prefix, tmp_path, symbols=3) as group:
        stays, _, goes = (f"binance:{symbol}" for symbol in group.exchange.symbols)
        symbols = tmp_path / "symbols.txt"
        symbols.write_text(f"{stays}\n{goes}\n")
        ingest = group.ingest(SYMBOLS="", SYMBOLS_FILE=str(symbols))
        member = group.join(seconds_per_forecast=0.001)
        member.wait_until_ready()

        def published() -> list[tuple[str, str]]:
            """Series and schema of all records, in order per series."""
            records = read_topic(kafka.bootstrap, forecast_topic(topic_prefix))
            return [(key, orjson.loads(value)["schema"]) for key, value in records]

        gone = f"{goes}:1s"
        wait_for("both are forecast", lambda: len({key for key, _ in published()}) == 2)
        symbols.write_text(f"{stays}\n")
        ingest.signal(signal.SIGHUP)
        wait_for("it is removed", lambda: (gone, REMOVAL) in published())
        wait_for("the member drops it", lambda: _states(member) == {f"{stays}:1s"})
        symbols.write_text(f"{stays}\n{goes}\n")
        ingest.signal(signal.SIGHUP)
        wait_for("it is forecast again", lambda: _last_schema(published(), gone) == FORECAST)
        assert group.stop(member) == ingest.stop() == 0
        records = read_topic(kafka.bootstrap, forecast_topic(topic_prefix))
    messages = [orjson.loads(value) for key, value in records if key == gone]
    (end,) = (i for i, message in enumerate(messages) if message["schema"] == REMOVAL)
    # Added again, it has its full context again.
    forecasts = messages[:end] + messages[end + 1 :]
    assert {message["context"]["bars"] for message in forecasts} == {64}


def _last_schema(published: Sequence[tuple[str, str]], series: str) -> str:
    return [schema for key, schema in published if key == series][-1]


def _states(member: DaemonProcess) -> set[str]:
    return {row["series"] for row in member.series_status()}


def test_role_ingest_takes_over_a_state_file_of_role_all(
    kafka: ApacheKafka, topic_prefix: str, tmp_path: Path
) -> None:
    """It relays the stored bars as history; role all then continues without a gap."""
    with forecast_group(kafka, topic_prefix, tmp_path, symbols=2) as group:
        folder = tmp_path / "state"
        folder.mkdir()
        shared = {
            **group.exchange.settings(),
            "STATE_FILE": str(folder / "state.sqlite"),
            "MODEL": "nano",
            "HORIZON": "2",
            "PATHS": "4",
            "QUANTILES": "0.5",
        }
        alone = group.process("alone", SINKS="kafka", **shared)
        alone.start()
        alone.wait_until_ready()
        done = "kronos_outcomes_total"
        wait_for("some are forecast", lambda: alone.metric(done, result="forecast") > 6)
        assert alone.stop() == 0
        ingest = group.process("then", ROLE="ingest", **shared)
        ingest.start()
        ingest.wait_until_ready()
        topic = candle_topic(topic_prefix, SECOND)

        def relayed() -> list[dict[str, Any]]:
            return [orjson.loads(value) for _, value in read_topic(kafka.bootstrap, topic)]

        wait_for("new bars are relayed", lambda: _new_bars(relayed()) > 6)
        assert ingest.stop() == 0
        for series in group.series:
            bars = [bar for bar in relayed() if bar["series"] == series.name]
            times = [parse_time(bar["time"]) for bar in bars]
            assert times == list(range(times[0], times[-1] + 1_000, 1_000))
            flags = [bool(bar.get("history")) for bar in bars]
            assert flags == sorted(flags, reverse=True)
            assert sum(flags) >= 64
        alone.start()
        alone.wait_until_ready()
        assert alone.metric("kronos_gaps_total") == 0
        assert alone.stop() == 0
    assert not audit_forecasts(
        read_topic(kafka.bootstrap, forecast_topic(topic_prefix)), {}
    ).problems


def _new_bars(relayed: Sequence[Mapping[str, Any]]) -> int:
    return sum(not bar.get("history") for bar in relayed)
