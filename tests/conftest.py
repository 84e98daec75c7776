"""Shared fixtures, the marker ``virtual_time``, and the summary of skipped tests.

The files in ``data/parity`` were made with the reference implementation
(github.com/shiyu-coder/Kronos, MIT): inputs and its outputs.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from prometheus_client.metrics import MetricWrapperBase

from kronos_connectors.kafka.admin import create
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import required_topics
from kronos_stream import Context, Forecaster
from kronos_stream.bars.window import Window
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.forecast.compose import Composer
from kronos_stream.forecast.message import Engine, Latency, Model, Sampling
from kronos_stream.forecast.outlook import build_outlook
from kronos_stream.interfaces.sink import Envelope
from kronos_stream.market.candle import Candle
from kronos_stream.market.series import Series
from kronos_stream.model import Predictor, Tokenizer, load_predictor, load_tokenizer
from kronos_stream.testing.virtual_time import VirtualLoop
from tests.support.apache_kafka import ApacheKafka
from tests.support.daemon_process import DaemonProcess
from tests.support.exchange_process import ExchangeProcess
from tests.support.mosquitto import Mosquitto, mosquitto_program
from tests.support.paths import DATA, ROOT
from tests.support.processes import ProcessFailed, restore_default_signals
from tests.support.prometheus import Prometheus, prometheus_program


def pytest_configure() -> None:
    restore_default_signals()


def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run tests with the marker ``virtual_time`` on a loop that skips waiting times."""
    if item.get_closest_marker("virtual_time"):
        return {"virtual": VirtualLoop}
    return {"real": asyncio.new_event_loop}


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Report the tests that did not run: a line per reason."""
    reasons = Counter(
        str(report.longrepr[2]).removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    expressions = [f"-{name} {config.getoption(dest)!r}" for name, dest in _SELECTIONS]
    chosen = [text for text in expressions if not text.endswith("''")]
    if reasons or chosen:
        terminalreporter.section("left out")
    for reason, count in sorted(reasons.items()):
        terminalreporter.line(f"{count:5} {reason}")
    if chosen:
        terminalreporter.line(f"      and tests that do not match {' '.join(chosen)}")


_SELECTIONS = (("m", "markexpr"), ("k", "keyword"))


@pytest.fixture(scope="session", autouse=True)
def _single_thread() -> None:
    """Threads do not speed up tiny networks, and slow them down on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def parity_folder() -> Path:
    """Folder of the reference's files: ``tiny`` and ``published``."""
    return DATA / "parity"


@pytest.fixture(scope="session")
def parity_cases(parity_folder: Path) -> dict[str, NDArray[Any]]:
    """The tiny fixture's arrays by name; read-only."""
    with np.load(parity_folder / "tiny" / "cases.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


@pytest.fixture(scope="session")
def parity_expected(parity_folder: Path) -> dict[str, Any]:
    """The tiny fixture's scalars: greedy cases, training losses, gradient norms."""
    described: dict[str, Any] = json.loads(
        (parity_folder / "tiny" / "cases.json").read_text("utf-8")
    )
    return described


@pytest.fixture(scope="session")
def tiny_tokenizer(parity_folder: Path) -> Tokenizer:
    """The tiny tokenizer; shared, so a test that changes it must load its own."""
    return load_tokenizer(parity_folder / "tiny" / "tokenizer")


@pytest.fixture(scope="session")
def tiny_predictor(parity_folder: Path) -> Predictor:
    """The tiny predictor; shared, so a test that changes it must load its own."""
    return load_predictor(parity_folder / "tiny" / "predictor")


@pytest.fixture(scope="session")
def tiny_forecaster(tiny_predictor: Predictor, tiny_tokenizer: Tokenizer) -> Forecaster:
    """The tiny checkpoint on the CPU in float32, with the 128 bars that it was trained with."""
    return Forecaster(
        tiny_predictor, tiny_tokenizer, device="cpu", dtype="float32", max_context=128
    )


@pytest.fixture(scope="session")
def make_contexts() -> Callable[..., list[Context]]:
    """Make contexts of five-minute bars, one per length: ``make_contexts([90, 33], seed=1)``.

    Prices and volumes are random walks. A context depends only on ``seed`` and its position in the
    call; its series is named after both unless ``named=False``.
    """

    def make(lengths: Sequence[int], *, seed: int = 0, named: bool = True) -> list[Context]:
        names = [f"test:{seed}/{i}:5m" if named else None for i in range(len(lengths))]
        return [
            _random_walk(length, np.random.default_rng([seed, i]), name)
            for i, (length, name) in enumerate(zip(lengths, names, strict=True))
        ]

    return make


def _random_walk(length: int, random: np.random.Generator, series: str | None) -> Context:
    close = 100 * np.exp(random.normal(0, 0.01, length + 1).cumsum())
    opened, close = close[:-1], close[1:]
    high, low = np.maximum(opened, close) * 1.003, np.minimum(opened, close) * 0.997
    volume = random.lognormal(3, 1, length)
    values = np.stack((opened, high, low, close, volume, volume * close), axis=1)
    times = 1_700_000_100_000 + 300_000 * np.arange(length)
    return Context(values, times, series=series, timeframe="5m")


# Apache Kafka, Mosquitto, Prometheus. Where one is not installed, its tests are skipped, or fail
# with KRONOS_REQUIRE_KAFKA=1, KRONOS_REQUIRE_MOSQUITTO=1, KRONOS_REQUIRE_PROMETHEUS=1, as in CI.


def _skip(name: str, reason: object) -> NoReturn:
    if os.environ.get(f"KRONOS_REQUIRE_{name.upper()}") == "1":
        pytest.fail(f"no {name}: {reason}")
    pytest.skip(f"not tested with {name}: {reason}")


_POM = ROOT / "tests" / "support" / "kafka" / "pom.xml"
_BUILD = ROOT / "build" / "kafka"


@pytest.fixture(scope="session")
def kafka_jars() -> Path:
    """Folder of Kafka's jars: that of KAFKA_HOME, or one that Maven fetched."""
    if shutil.which("java") is None:
        _skip("Kafka", "no java on PATH")
    if home := os.environ.get("KAFKA_HOME"):
        return Path(home) / "libs"
    libs = _BUILD / "libs"
    _BUILD.mkdir(parents=True, exist_ok=True)
    with (_BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test run may fetch them, too
        complete = _BUILD / "complete"
        if not complete.exists() or complete.stat().st_mtime < _POM.stat().st_mtime:
            shutil.rmtree(libs, ignore_errors=True)
            _fetch_jars(libs)
            complete.touch()
    return libs


@pytest.fixture(scope="session")
def kafka(kafka_jars: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApacheKafka]:
    """One node of Apache Kafka, shared: no test may stop it; each has its own topics."""
    with ApacheKafka(kafka_jars, tmp_path_factory.mktemp("kafka")) as broker:
        yield broker


@pytest.fixture
def topic_prefix(tmp_path: Path) -> str:
    """Prefix for the topics of one test: the name of its own folder."""
    return tmp_path.name


@pytest.fixture
def make_daemon(tmp_path: Path, topic_prefix: str) -> Callable[..., DaemonProcess]:
    """Make a daemon, not yet started: ``make_daemon(exchange, bootstrap, CATCH_UP="all")``.

    It forecasts every market of the exchange with nano, into topics that are created here.
    """

    def make(exchange: ExchangeProcess, bootstrap: str, **settings: str) -> DaemonProcess:
        kafka = KafkaOptions(bootstrap_servers=bootstrap, topic_prefix=topic_prefix, partitions=4)
        asyncio.run(create(kafka, required_topics(kafka)))
        return DaemonProcess(
            tmp_path,
            {
                "SINKS": "kafka",
                "KAFKA__BOOTSTRAP_SERVERS": bootstrap,
                "KAFKA__TOPIC_PREFIX": topic_prefix,
                "MODEL": "nano",
                "LOOKBACK": "96",
                "HORIZON": "8",
                "PATHS": "20",
                **exchange.settings(),
                **settings,
            },
        )

    return make


def _fetch_jars(libs: Path) -> None:
    command = ["mvn", "-q", "-B", "-f", str(_POM), "dependency:copy-dependencies"]
    if shutil.which("mvn") is None:
        _skip("Kafka", "no mvn on PATH, and KAFKA_HOME not set")
    try:
        subprocess.run(  # noqa: S603
            [*command, f"-DoutputDirectory={libs}"], check=True, capture_output=True, timeout=600
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        output = (error.stdout or b"").decode(errors="replace").strip().splitlines()
        _skip("Kafka", f"Maven did not fetch it ({output[0] if output else error})")


@pytest.fixture
def make_mosquitto(tmp_path: Path) -> Callable[..., Mosquitto]:
    """Make a broker, not yet started: ``make_mosquitto(users={"me": "secret"})``."""
    try:
        mosquitto_program("mosquitto")
    except ProcessFailed as error:
        _skip("Mosquitto", error)
    return partial(Mosquitto, tmp_path / "mosquitto")


@pytest.fixture
def make_prometheus(tmp_path: Path) -> Callable[[str], Prometheus]:
    """Make a server with a configuration, not yet started; its folder is ``prometheus``."""
    _prometheus_program("prometheus")
    return partial(Prometheus, tmp_path / "prometheus")


@pytest.fixture
def promtool() -> str:
    """Path of the program that checks Prometheus's files."""
    return _prometheus_program("promtool")


def _prometheus_program(name: str) -> str:
    try:
        return prometheus_program(name)
    except ProcessFailed as error:
        _skip("Prometheus", error)


@pytest.fixture(scope="session")
def metric_labels() -> dict[str, frozenset[str]]:
    """Names of the daemon's metrics, of samples and histograms, and their labels."""
    metrics = Metrics()
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase) and metric._labelnames:
            metric.labels(*metric._labelnames)  # creates a sample
    families = list(metrics.registry.collect())
    samples = [sample for family in families for sample in family.samples]
    found = {sample.name: frozenset(sample.labels) for sample in samples}
    histograms = {family.name for family in families if family.type == "histogram"}
    return found | {name: found[f"{name}_count"] for name in histograms}


@pytest.fixture(scope="session")
def make_forecast() -> Callable[..., Envelope]:
    """Make a forecast of the newest closed bar: ``make_forecast("binance:BTC/USDT:5m")``.

    p_up: a multiple of 0.05. ago: bars by which it is outdated. reasons: why it is degraded.
    """

    def make(
        name: str,
        *,
        p_up: float = 0.7,
        ago: int = 0,
        revision: int = 0,
        reasons: Sequence[str] = (),
    ) -> Envelope:
        series, now = Series.parse(name), time.time_ns() // 1_000_000
        length = series.timeframe.milliseconds or 0
        origin = now - now % length - (1 + ago) * length
        paths = np.full((20, 3, 6), 100.0, np.float32)
        paths[:, :, 1] = 110.0
        paths[: round(20 * p_up), :, 3] = 105.0
        return Composer(
            Model(name="nano", revision=None, tokenizer="nano"),
            Engine(version="0", device="cpu", dtype="float32"),
            Sampling(paths=20, temperature=1.0, top_k=0, top_p=0.9, seed=0, anchor=True),
        ).forecast(
            Window(
                series,
                np.full((10, 6), 100.0, np.float32),
                origin + length * np.arange(-9, 1),
                0,
                revision,
                Candle(origin, 100.0, 100.0, 100.0, 100.0, 1.0),
                tuple(reasons),
            ),
            build_outlook(paths, origin + length * np.arange(1, 4), 100.0, [0.05, 0.5, 0.95]),
            created=now,
            latency=Latency(close_to_received=1, queued=1, compute=1),
        )

    return make
