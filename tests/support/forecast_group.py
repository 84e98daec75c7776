"""Ingest and a group of forecast daemons on Kafka, whose members tests add, stop and kill."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import orjson
from confluent_kafka import Consumer, TopicPartition

from kronos_connectors.kafka.admin import create
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import candle_topic, forecast_topic, required_topics
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.utc import parse_time
from tests.support.apache_kafka import ApacheKafka
from tests.support.daemon_process import DaemonProcess
from tests.support.exchange_process import ExchangeProcess
from tests.support.fake_worker import daemon_command
from tests.support.forecast_audit import AuditReport, audit_forecasts, read_topic
from tests.support.processes import COMMAND, WAIT_SECONDS

LATE_MS = 3_000
"""A forecast that arrives so long after the close of its bar was delayed by an outage."""


class TopicListener:
    """Reads a topic of forecasts, and records when each arrived."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        self.arrivals: list[tuple[float, str, int]] = []
        """Time of arrival (UTC ms), series, close of the bar (UTC ms)."""
        self._stop = threading.Event()
        self._consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "listener"})
        partitions = (
            self._consumer.list_topics(topic, timeout=WAIT_SECONDS).topics[topic].partitions
        )
        self._consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while not self._stop.is_set():
            for message in self._consumer.consume(500, 0.2):
                record = orjson.loads(message.value() or b"{}")
                if "origin" in record:
                    close = parse_time(record["origin"]) + 1_000
                    self.arrivals.append((time.time() * 1000, record["series"], close))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._consumer.close()

    def caught_up(self, since: float) -> float:
        """Seconds from ``since`` (UTC ms) to the last late forecast."""
        late = [at for at, _, close in self.arrivals if at > since and at - close > LATE_MS]
        return (max(late) - since) / 1000 if late else 0.0


@dataclass
class ForecastGroup:
    """An exchange, a daemon with role ingest, and daemons with role forecast."""

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
        process = self.process("ingest", ROLE="ingest", **self.exchange.settings() | settings)
        process.start()
        process.wait_until_ready()
        return process

    def join(self, seconds_per_forecast: float | None = None) -> DaemonProcess:
        """Start one more member, and return at once.

        seconds_per_forecast: replaces the model by one that takes so long.
        """
        name = f"member-{len(self.members) + len(self.ended)}"
        member = self.process(
            name,
            (*COMMAND, "run")
            if seconds_per_forecast is None
            else daemon_command(seconds_per_forecast),
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
        """End a member with SIGKILL, and return the time (UTC ms)."""
        self.members.remove(member)
        self.ended.append(member)
        killed_at = time.time() * 1000
        member.kill()
        return killed_at

    def stop(self, member: DaemonProcess) -> int:
        """End a member with SIGTERM, and return its exit status."""
        self.members.remove(member)
        self.ended.append(member)
        return member.stop()

    def lag(self) -> float:
        return sum(member.metric("kronos_candle_lag") for member in self.members)

    def expected_bars(self) -> dict[Series, list[int]]:
        """Open times of the bars to be forecast.

        All bars of the exchange from the first to the last that ingest relayed as new.
        """
        opens: dict[str, list[int]] = defaultdict(list)
        for timeframe in self.exchange.timeframes:
            topic = candle_topic(self.prefix, Timeframe.parse(timeframe))
            for key, value in read_topic(self.bootstrap, topic):
                bar = orjson.loads(value)
                if not bar.get("history"):
                    opens[key].append(parse_time(bar["time"]))
        return {
            series: self.exchange.closed_bar_times(series, min(times), max(times))
            for series in self.series
            if (times := opens[series.name])
        }

    def audit(self) -> AuditReport:
        return audit_forecasts(
            read_topic(self.bootstrap, forecast_topic(self.prefix)), self.expected_bars()
        )


@contextmanager
def forecast_group(
    kafka: ApacheKafka,
    prefix: str,
    folder: Path,
    *,
    symbols: int,
    timeframes: str = "1s",
    **settings: str,
) -> Iterator[ForecastGroup]:
    """Start an exchange, and create the topics of a group without members."""
    options = KafkaOptions(bootstrap_servers=kafka.bootstrap, topic_prefix=prefix, partitions=12)
    names = timeframes.split(",")
    parsed = [Timeframe.parse(name) for name in names]
    asyncio.run(create(options, required_topics(options, parsed)))
    arguments = [part for name in names for part in ("--timeframe", name)]
    with (
        ExchangeProcess("--symbols", str(symbols), *arguments) as exchange,
        ExitStack() as stack,
    ):
        given = {"LOOKBACK": "64", **settings}
        yield ForecastGroup(kafka.bootstrap, prefix, exchange, folder, stack, given)
