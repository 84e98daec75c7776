"""Candles of kcat are forecast, in spite of kills, duplicates and malformed records."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random

import orjson
import pytest

from kronos_connectors.kafka.admin import create
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import candle_topic, required_topics
from kronos_stream.forecast.message import DeadLetter, Forecast
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.utc import rfc3339
from tests.support.apache_kafka import ApacheKafka
from tests.support.daemon_process import DaemonProcess
from tests.support.forecast_audit import audit_forecasts, read_topic
from tests.support.processes import wait_for

SECOND = Timeframe.parse("1s")
SERIES = [Series.of("kafka", f"{base}/USDT", SECOND) for base in ("BTC", "ETH", "SOL")]
HISTORY = 60

pytestmark = pytest.mark.skipif(shutil.which("kcat") is None, reason="no kcat on this machine")


class KcatProducer:
    """Produces one-second bars with kcat as they close, in hand-made JSON."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        kcat = shutil.which("kcat") or "kcat"
        self._command = [kcat, "-P", "-b", bootstrap, "-t", topic, "-K", "\t"]
        self.opens: dict[Series, list[int]] = defaultdict(list)
        self.malformed: set[str] = set()
        self._stop = threading.Event()
        self._random = Random(0)
        self._thread = threading.Thread(target=self._trade)

    def start(self) -> None:
        """Produce the history at once, and then each bar as it closes."""
        now = time.time_ns() // 1_000_000 // 1_000 * 1_000
        past = range(now - HISTORY * 1_000, now, 1_000)
        self.produce([self.bar(series, opened) for opened in past for series in SERIES])
        self._thread.start()

    def bar(self, series: Series, opened: int, close: float | None = None) -> str:
        """Input line of kcat for a bar."""
        bar = {
            "time": rfc3339(opened),
            "open": 100.0,
            "high": 200.0,
            "low": 50.0,
            "close": 100 + 10 * self._random.random() if close is None else close,
            "volume": 1.5,
        }
        if not self.opens[series] or opened > self.opens[series][-1]:
            self.opens[series].append(opened)
        return f"{series}\t{orjson.dumps(bar).decode()}\n"

    def produce(self, lines: Sequence[str]) -> None:
        """Produce records in order, with a new kcat, which sends them at the end of its input."""
        subprocess.run(self._command, input="".join(lines), text=True, check=True)

    def _trade(self) -> None:
        """Produce a bar per second, sometimes twice, sometimes with foreign or malformed ones."""
        opened = self.opens[SERIES[0]][-1] + 1_000
        while not self._stop.wait(max(0.0, opened / 1000 + 1 - time.time())):
            lines = []
            for series in SERIES:
                line = self.bar(series, opened)
                lines += [line] * (2 if self._random.random() < 0.2 else 1)
                if self._random.random() < 0.2:
                    lines.append(f"binance:BTC/USDT:1s\t{line.partition(chr(9))[2]}")
                    bad = f"{{not JSON of {series} at {opened}}}"
                    self.malformed.add(bad)
                    lines.append(f"{series}\t{bad}\n")
            self.produce(lines)
            opened += 1_000

    def close(self) -> None:
        """Stop producing bars."""
        self._stop.set()
        self._thread.join()


@contextmanager
def _market(bootstrap: str, prefix: str) -> Iterator[KcatProducer]:
    market = KcatProducer(bootstrap, candle_topic(prefix, SECOND))
    try:
        yield market
    finally:
        market.close()


def _daemon(bootstrap: str, prefix: str, folder: Path) -> DaemonProcess:
    options = KafkaOptions(bootstrap_servers=bootstrap, topic_prefix=prefix, partitions=2)
    asyncio.run(create(options, required_topics(options, [SECOND])))
    return DaemonProcess(
        folder,
        {
            "SYMBOLS": ",".join(f"kafka:{series.symbol}" for series in SERIES),
            "TIMEFRAMES": "1s",
            "SINKS": "kafka",
            "KAFKA__BOOTSTRAP_SERVERS": bootstrap,
            "KAFKA__TOPIC_PREFIX": prefix,
            "MODEL": "nano",
            "LOOKBACK": "32",
            "HORIZON": "4",
            "PATHS": "20",
            "CATCH_UP": "all",
        },
    )


@pytest.mark.parametrize(
    "kills", [2, pytest.param(30, marks=[pytest.mark.soak, pytest.mark.timeout(900)])]
)
def test_candles_of_kcat_are_forecast_in_spite_of_kills(
    kills: int, kafka: ApacheKafka, topic_prefix: str, tmp_path: Path
) -> None:
    daemon = _daemon(kafka.bootstrap, topic_prefix, tmp_path)
    random = Random(kills)
    with _market(kafka.bootstrap, topic_prefix) as market, daemon:
        market.start()
        daemon.start()
        daemon.wait_until_ready()
        began = _wait_for_newer(kafka, topic_prefix, 0)
        for _ in range(kills):
            time.sleep(random.uniform(0, 4))
            daemon.kill()
            time.sleep(random.uniform(0, 8))  # bars of this time are only on the topic
            killed = time.time_ns() // 1_000_000
            daemon.start()
            daemon.wait_until_ready()
            print(f"{_wait_for_newer(kafka, topic_prefix, killed):.1f} s after a kill")  # noqa: T201
        market.close()
        newest = market.opens[SERIES[0]][-1]
        wait_for(
            "the last bars are forecast",
            lambda: _origins(kafka, topic_prefix) >= {(one.name, newest, 0) for one in SERIES},
            interval=1,
        )
        market.produce([market.bar(SERIES[0], newest, 123.0)])  # the producer corrects it
        revised = (SERIES[0].name, newest, 1)
        wait_for("the revision", lambda: revised in _origins(kafka, topic_prefix), interval=1)
        assert daemon.stop() == 0
        decided = daemon.outcome_range(SERIES)
        assert daemon.undelivered() == 0
    assert began > 0
    due = {}
    for series, (first, last) in decided.items():
        assert last == newest
        due[series] = [opened for opened in market.opens[series] if first <= opened <= last]
    assert len(due) == len(SERIES)
    assert min(map(len, due.values())) >= 10

    records = read_topic(kafka.bootstrap, f"{topic_prefix}.forecasts.v1")
    found = audit_forecasts(records, due)
    print(  # noqa: T201
        f"{kills} kills: {sum(map(len, due.values()))} bars due, {found.records} records, "
        f"{found.duplicates} of them twice"
    )
    assert found.problems == []
    made = [Forecast.parse(value) for _, value in records]
    assert [one.reasons for one in made if one.degraded] == []
    assert {one.last.close for one in made if one.revision} == {123.0}
    assert all(one.context.bars == 32 and one.context.synthetic == 0 for one in made)
    letters = read_topic(kafka.bootstrap, f"{topic_prefix}.deadletter.v1")
    parsed = [DeadLetter.parse(value) for _, value in letters]
    assert all("Invalid JSON" in one.reason for one in parsed)
    # Each is a dead letter, repeated if a kill came before the commit of its offset.
    assert {one.payload for one in parsed} == market.malformed
    assert len(parsed) <= len(market.malformed) * (1 + kills)


def test_late_bars_are_sorted_and_missing_ones_become_synthetic(
    kafka: ApacheKafka, topic_prefix: str, tmp_path: Path
) -> None:
    daemon = _daemon(kafka.bootstrap, topic_prefix, tmp_path)
    one, other = SERIES[0].name, SERIES[1].name
    with _market(kafka.bootstrap, topic_prefix) as market, daemon:
        market.start()
        daemon.start()
        daemon.wait_until_ready()
        _wait_for_newer(kafka, topic_prefix, 0)
        market.close()
        last = market.opens[SERIES[0]][-1]
        newest = last + 4_000
        time.sleep(max(0.0, newest / 1000 + 1 - time.time()))
        lines = [market.bar(SERIES[0], last + bars * 1_000) for bars in (2, 1, 4, 3)]
        market.produce([*lines, market.bar(SERIES[1], newest)])
        both = {(one, newest, 0), (other, newest, 0)}
        wait_for("both", lambda: both <= _origins(kafka, topic_prefix), interval=0.5)
        assert daemon.stop() == 0
    made = {
        forecast.series: forecast
        for forecast in _forecasts(kafka, topic_prefix)
        if forecast.origin.timestamp() * 1000 == newest
    }
    assert made[one].context.synthetic == 0
    # Missing bars become synthetic once later bars arrive.
    assert made[other].context.synthetic == 3
    assert made[other].degraded
    assert SERIES[2].name not in made  # a silent series gets no bars


def _forecasts(kafka: ApacheKafka, prefix: str) -> Sequence[Forecast]:
    records = read_topic(kafka.bootstrap, f"{prefix}.forecasts.v1")
    return [Forecast.parse(value) for _, value in records]


def _origins(kafka: ApacheKafka, prefix: str) -> set[tuple[str, int, int]]:
    return {
        (one.series, int(one.origin.timestamp() * 1000), one.revision)
        for one in _forecasts(kafka, prefix)
    }


def _wait_for_newer(kafka: ApacheKafka, prefix: str, moment: int) -> float:
    """Wait until every series has a forecast of a bar after ``moment``; return the seconds."""
    began = time.monotonic()

    def all_have() -> bool:
        have = {name for name, opened, _ in _origins(kafka, prefix) if opened > moment}
        return len(have) == len(SERIES)

    wait_for("forecasts of all series", all_have, interval=0.5)
    return time.monotonic() - began
