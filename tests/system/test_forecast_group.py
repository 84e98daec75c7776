"""Ingest and a group of forecasters on a real Kafka: killed, joined, stopped, shared out anew."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest
from confluent_kafka import Consumer, TopicPartition

from kronos_connectors.kafka.admin import create
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import candle_topic, forecast_topic, required_topics
from kronos_stream.forecast.message import FORECAST, REMOVAL
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.utc import parse_time
from tests.support.apache_kafka import ApacheKafka
from tests.support.daemon_process import DaemonProcess
from tests.support.exchange_process import ExchangeProcess
from tests.support.fake_worker import daemon_command
from tests.support.forecast_audit import AuditReport, audit_forecasts, read_topic
from tests.support.processes import COMMAND, wait_for

SECOND = Timeframe.parse("1s")
LATE_MS = 3_000
"""A forecast that arrives so long after its bar's close shows that somebody was away."""


class TopicListener:
    """Reads a topic of forecasts as they come: when each arrived, and of which bar's close."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        self.arrivals: list[tuple[float, str, int]] = []
        """Wall clock in ms, series, close in ms."""
        self._stop = threading.Event()
        self._consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "listener"})
        places = self._consumer.list_topics(topic, timeout=30).topics[topic].partitions
        self._consumer.assign([TopicPartition(topic, one, 0) for one in places])
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while not self._stop.is_set():
            for message in self._consumer.consume(500, 0.2):
                said = orjson.loads(message.value() or b"{}")
                if "origin" in said:
                    close = parse_time(said["origin"]) + 1_000
                    self.arrivals.append((time.time() * 1000, said["series"], close))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._consumer.close()

    def caught_up(self, since: float) -> float:
        """Seconds after ``since`` (wall clock, ms) at which the last late forecast arrived."""
        late = [at for at, _, close in self.arrivals if at > since and at - close > LATE_MS]
        return (max(late) - since) / 1000 if late else 0.0


@dataclass
class ForecastGroup:
    """An exchange, an ingester and members that come and go."""

    bootstrap: str
    prefix: str
    exchange: ExchangeProcess
    folder: Path
    stack: ExitStack
    settings: Mapping[str, str]
    members: list[DaemonProcess] = field(default_factory=list)
    ended: list[DaemonProcess] = field(default_factory=list)

    @property
    def series(self) -> Sequence[Series]:
        return self.exchange.series()

    def process(
        self, name: str, command: Sequence[str] = (*COMMAND, "run"), **settings: str
    ) -> DaemonProcess:
        folder = self.folder / name
        folder.mkdir()
        shared = {
            "KAFKA__BOOTSTRAP_SERVERS": self.bootstrap,
            "KAFKA__TOPIC_PREFIX": self.prefix,
            "TIMEFRAMES": ",".join(self.exchange.timeframes),
            "CATCH_UP": "all",
        }
        process = DaemonProcess(folder, {**shared, **self.settings, **settings}, command)
        return self.stack.enter_context(process)

    def ingest(self, **settings: str) -> DaemonProcess:
        told = self.exchange.settings() | settings
        process = self.process("ingest", ROLE="ingest", **told)
        process.start()
        process.wait_until_ready()
        return process

    def join(self, pace: float | None = None) -> DaemonProcess:
        """One more member; returns at once. pace: with a stand-in that takes so long."""
        name = f"member-{len(self.members) + len(self.ended)}"
        member = self.process(
            name,
            (*COMMAND, "run") if pace is None else daemon_command(pace),
            ROLE="forecast",
            SINKS="kafka",
            MODEL="nano",
            HORIZON="2",
            PATHS="4",
            QUANTILES="0.5",
            THREADS="1",
        )
        member.start()
        self.members.append(member)
        return member

    def kill(self, member: DaemonProcess) -> float:
        """kill -9; when, in ms."""
        self.members.remove(member)
        self.ended.append(member)
        at = time.time() * 1000
        member.kill()
        return at

    def stop(self, member: DaemonProcess) -> int:
        """SIGTERM; its exit status."""
        self.members.remove(member)
        self.ended.append(member)
        return member.stop()

    def lag(self) -> float:
        return sum(member.metric("kronos_candle_lag") for member in self.members)

    def expected_bars(self) -> dict[Series, list[int]]:
        """Opens of the bars to be forecast.

        All that the exchange has, from the first to the newest that ingest passed on as news.
        """
        opens: dict[str, list[int]] = defaultdict(list)
        for timeframe in self.exchange.timeframes:
            topic = candle_topic(self.prefix, Timeframe.parse(timeframe))
            for key, value in read_topic(self.bootstrap, topic):
                told = orjson.loads(value)
                if not told.get("history"):
                    opens[key].append(parse_time(told["time"]))
        return {
            one: self.exchange.closed_bar_times(one, min(opens[one.name]), max(opens[one.name]))
            for one in self.series
            if opens[one.name]
        }

    def audit(self) -> AuditReport:
        return audit_forecasts(
            read_topic(self.bootstrap, forecast_topic(self.prefix)), self.expected_bars()
        )


@contextmanager
def group(
    kafka: ApacheKafka,
    prefix: str,
    folder: Path,
    *,
    symbols: int,
    timeframes: str = "1s",
    **settings: str,
) -> Iterator[ForecastGroup]:
    options = KafkaOptions(bootstrap_servers=kafka.bootstrap, topic_prefix=prefix, partitions=12)
    lengths = [Timeframe.parse(one) for one in timeframes.split(",")]
    asyncio.run(create(options, required_topics(options, lengths)))
    arguments = [part for one in timeframes.split(",") for part in ("--timeframe", one)]
    with (
        ExchangeProcess("--symbols", str(symbols), *arguments) as exchange,
        ExitStack() as stack,
    ):
        given = {"LOOKBACK": "64", **settings}
        yield ForecastGroup(kafka.bootstrap, prefix, exchange, folder, stack, given)


def _run_group(
    group: ForecastGroup, *, rounds: int, seconds: float, seed: int
) -> tuple[AuditReport, list[float]]:
    """Kill a member and add one, ``rounds`` times within ``seconds``; then let all be finished."""
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


def test_members_and_ingest_are_killed_and_every_bar_is_forecast(
    kafka: ApacheKafka, topic_prefix: str, tmp_path: Path
) -> None:
    with group(kafka, topic_prefix, tmp_path, symbols=6) as trial:
        found, caught_up = _run_group(trial, rounds=1, seconds=24, seed=1)
    print(f"\n{found.records} forecasts, {found.duplicates} twice; caught up after {caught_up} s")  # noqa: T201
    assert not found.problems
    assert found.records > 6 * 15


def test_who_comes_and_goes_in_good_order_costs_nothing_twice(
    kafka: ApacheKafka, topic_prefix: str, tmp_path: Path
) -> None:
    """A rolling restart, under way with more than the members can do at once."""
    with group(kafka, topic_prefix, tmp_path, symbols=8) as trial:
        ingest = trial.ingest()
        for _ in range(2):
            trial.join(pace=0.15)
        for _ in range(2):
            trial.members[-1].wait_until_ready()
            trial.join(pace=0.15)
            time.sleep(2)
            assert trial.stop(trial.members[0]) == 0
        assert ingest.stop() == 0
        trial.join(pace=0.005)
        wait_for("everything is read", lambda: trial.lag() == 0, interval=0.5)
        for member in [*trial.members]:
            member.wait_until_ready()
            wait_for("it is done", lambda one=member: one.metric(_DUE, queue="due") == 0)  # type: ignore[misc]
            assert trial.stop(member) == 0
        found = trial.audit()
    print(f"\n{found.records} forecasts, {found.duplicates} twice")  # noqa: T201
    assert not found.problems
    assert found.duplicates == 0


_DUE = "kronos_queue_depth"


@pytest.mark.soak
def test_sixty_series_and_two_kills_in_three_minutes(
    kafka: ApacheKafka, topic_prefix: str, tmp_path: Path
) -> None:
    with group(kafka, topic_prefix, tmp_path, symbols=60) as trial:
        found, caught_up = _run_group(trial, rounds=2, seconds=180, seed=2)
    print(f"\n{found.records} forecasts, {found.duplicates} twice; caught up after {caught_up} s")  # noqa: T201
    assert not found.problems
    assert found.records > 60 * 150


@pytest.mark.soak
def test_a_broker_that_goes_away_costs_no_bar(
    kafka_jars: Path, topic_prefix: str, tmp_path: Path
) -> None:
    with (
        ApacheKafka(kafka_jars, tmp_path / "kafka") as broker,
        group(broker, topic_prefix, tmp_path, symbols=6) as trial,
    ):
        ingest = trial.ingest()
        for _ in range(2):
            trial.join()
        for member in trial.members:
            member.wait_until_ready()
        for seconds in (3, 25):
            broker.kill()
            time.sleep(seconds)
            assert all(member.readiness()[0] == 503 for member in trial.members) or seconds < 25
            broker.start()
            for member in trial.members:
                member.wait_until_ready()
            time.sleep(10)
        assert ingest.stop() == 0
        wait_for("everything is read", lambda: trial.lag() == 0, interval=0.5)
        for member in [*trial.members]:
            assert trial.stop(member) == 0
        found = trial.audit()
    print(f"\n{found.records} forecasts, {found.duplicates} twice")  # noqa: T201
    assert not found.problems
    assert found.records > 6 * 50


def test_a_series_that_is_given_up_is_told_to_the_readers(
    kafka: ApacheKafka, topic_prefix: str, tmp_path: Path
) -> None:
    with group(kafka, topic_prefix, tmp_path, symbols=3) as trial:
        stays, _, goes = (f"binance:{symbol}" for symbol in trial.exchange.symbols)
        symbols = tmp_path / "symbols.txt"
        symbols.write_text(f"{stays}\n{goes}\n")
        ingest = trial.ingest(SYMBOLS="", SYMBOLS_FILE=str(symbols))
        member = trial.join(pace=0.001)
        member.wait_until_ready()

        def told() -> list[tuple[str, str]]:
            """Series and schema of all that was said, in order per series."""
            records = read_topic(kafka.bootstrap, forecast_topic(topic_prefix))
            return [(key, orjson.loads(value)["schema"]) for key, value in records]

        gone = f"{goes}:1s"
        wait_for("both are forecast", lambda: len({key for key, _ in told()}) == 2)
        symbols.write_text(f"{stays}\n")
        ingest.signal(signal.SIGHUP)
        wait_for("it is given up", lambda: (gone, REMOVAL) in told())
        wait_for("it is followed no more", lambda: _states(member) == {f"{stays}:1s"})
        symbols.write_text(f"{stays}\n{goes}\n")
        ingest.signal(signal.SIGHUP)
        wait_for("it is forecast again", lambda: told_last(told(), gone) == FORECAST)
        assert trial.stop(member) == ingest.stop() == 0
        records = read_topic(kafka.bootstrap, forecast_topic(topic_prefix))
    said = [orjson.loads(value) for key, value in records if key == gone]
    (end,) = (at for at, one in enumerate(said) if one["schema"] == REMOVAL)
    # Whoever follows it again has its whole past again.
    assert {one["context"]["bars"] for one in said[:end] + said[end + 1 :]} == {64}


def told_last(told: Sequence[tuple[str, str]], series: str) -> str:
    return [schema for key, schema in told if key == series][-1]


def _states(member: DaemonProcess) -> set[str]:
    return {row["series"] for row in member.series_status()}


def test_who_forecast_alone_before_passes_on_what_it_knows(
    kafka: ApacheKafka, topic_prefix: str, tmp_path: Path
) -> None:
    """A state file of role all, taken over by role ingest, and back."""
    with group(kafka, topic_prefix, tmp_path, symbols=2) as trial:
        folder = tmp_path / "state"
        folder.mkdir()
        shared = {
            **trial.exchange.settings(),
            "STATE_FILE": str(folder / "state.sqlite"),
            "MODEL": "nano",
            "HORIZON": "2",
            "PATHS": "4",
            "QUANTILES": "0.5",
        }
        alone = trial.process("alone", SINKS="kafka", **shared)
        alone.start()
        alone.wait_until_ready()
        done = "kronos_outcomes_total"
        wait_for("some are forecast", lambda: alone.metric(done, result="forecast") > 6)
        assert alone.stop() == 0
        ingest = trial.process("then", ROLE="ingest", **shared)
        ingest.start()
        ingest.wait_until_ready()
        topic = candle_topic(topic_prefix, SECOND)

        def passed() -> list[dict[str, Any]]:
            return [orjson.loads(value) for _, value in read_topic(kafka.bootstrap, topic)]

        wait_for("new bars are passed on", lambda: _news(passed()) > 6)
        assert ingest.stop() == 0
        for series in trial.series:
            bars = [one for one in passed() if one["series"] == series.name]
            times = [parse_time(one["time"]) for one in bars]
            assert times == list(range(times[0], times[-1] + 1_000, 1_000))
            flags = [bool(one.get("history")) for one in bars]
            assert flags == sorted(flags, reverse=True)
            assert sum(flags) >= 64
        alone.start()
        alone.wait_until_ready()
        assert alone.metric("kronos_gaps_total") == 0
        assert alone.stop() == 0
    assert not audit_forecasts(
        read_topic(kafka.bootstrap, forecast_topic(topic_prefix)), {}
    ).problems


def _news(passed: Sequence[Mapping[str, Any]]) -> int:
    return sum(not one.get("history") for one in passed)
