"""What the tests share: the reference's fixtures, the checkpoint they are about, random candles.

The fixtures in ``data/parity`` were made with the reference implementation
(github.com/shiyu-coder/Kronos, MIT): inputs and its answers.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
from kronos_stream.forecast.compose import Composer, Envelope
from kronos_stream.forecast.message import Engine, Latency, Model, Sampling
from kronos_stream.forecast.outlook import build_outlook
from kronos_stream.market.candle import Candle
from kronos_stream.market.series import Series
from kronos_stream.model import Predictor, Tokenizer, load_predictor, load_tokenizer
from tests.support.apache_kafka import ApacheKafka
from tests.support.daemon_process import DaemonProcess
from tests.support.mosquitto import Mosquitto, MosquittoFailed
from tests.support.mosquitto import find_program as mosquitto_program
from tests.support.paths import DATA, ROOT
from tests.support.processes import ExchangeProcess
from tests.support.prometheus import Prometheus, PrometheusFailed
from tests.support.prometheus import find_program as prometheus_program


@pytest.fixture(scope="session", autouse=True)
def _single_thread() -> None:
    """Tiny networks gain nothing by threads, and on a busy machine these wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def parity_folder() -> Path:
    """The folder of the reference's fixtures: ``tiny`` and ``published``."""
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
    """The tiny tokenizer as loaded; shared, so a test that changes it loads its own."""
    return load_tokenizer(parity_folder / "tiny" / "tokenizer")


@pytest.fixture(scope="session")
def tiny_predictor(parity_folder: Path) -> Predictor:
    """The tiny predictor as loaded; shared, so a test that changes it loads its own."""
    return load_predictor(parity_folder / "tiny" / "predictor")


@pytest.fixture(scope="session")
def tiny_forecaster(tiny_predictor: Predictor, tiny_tokenizer: Tokenizer) -> Forecaster:
    """The tiny checkpoint on the CPU in float32, with the 128 bars it was made for."""
    return Forecaster(
        tiny_predictor, tiny_tokenizer, device="cpu", dtype="float32", max_context=128
    )


@pytest.fixture(scope="session")
def make_contexts() -> Callable[..., list[Context]]:
    """Makes contexts of five-minute bars, one per length: ``walks([90, 33], seed=1)``.

    Prices and volumes are random walks; ``seed`` and the position in the call fix a context, and
    name its series unless ``named=False``.
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


# Apache Kafka. Where it cannot run, the tests that ask for it are skipped, and say so; with
# KRONOS_REQUIRE_KAFKA=1, as in CI, they fail instead.

_POM = ROOT / "tests" / "support" / "kafka" / "pom.xml"
_BUILD = ROOT / "build" / "kafka"


@pytest.fixture(scope="session")
def kafka_jars() -> Path:
    """Apache Kafka's jars: those of KAFKA_HOME, or Maven's, fetched once."""
    if shutil.which("java") is None:
        _skip_without_kafka("no java on PATH")
    if home := os.environ.get("KAFKA_HOME"):
        return Path(home) / "libs"
    libs = _BUILD / "libs"
    _BUILD.mkdir(parents=True, exist_ok=True)
    with (_BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other test runs may fetch them, too
        complete = _BUILD / "complete"
        if not complete.exists() or complete.stat().st_mtime < _POM.stat().st_mtime:
            shutil.rmtree(libs, ignore_errors=True)
            _fetch_jars(libs)
            complete.touch()
    return libs


@pytest.fixture(scope="session")
def kafka(kafka_jars: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApacheKafka]:
    """One node of Apache Kafka, shared: nobody stops it, and each test has its own topics."""
    with ApacheKafka(kafka_jars, tmp_path_factory.mktemp("kafka")) as broker:
        yield broker


@pytest.fixture
def topic_prefix(tmp_path: Path) -> str:
    """A prefix for the topics of one test; no other's folder has its name."""
    return tmp_path.name


@pytest.fixture
def load_factor() -> float:
    """How many times as long as on a quiet machine things may take: what runs, per core."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@pytest.fixture
def make_daemon(tmp_path: Path, topic_prefix: str) -> Callable[..., DaemonProcess]:
    """Makes a daemon, not yet started: ``daemon_of(exchange, bootstrap, CATCH_UP="all")``.

    It forecasts every market of the exchange with nano, into topics that are made here.
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
        _skip_without_kafka("no mvn on PATH, and KAFKA_HOME not set")
    try:
        subprocess.run(  # noqa: S603
            [*command, f"-DoutputDirectory={libs}"], check=True, capture_output=True, timeout=240
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = (error.stdout or b"").decode(errors="replace").strip().splitlines()
        _skip_without_kafka(f"Maven did not fetch it ({said[0] if said else error})")


def _skip_without_kafka(reason: str) -> None:
    if os.environ.get("KRONOS_REQUIRE_KAFKA") == "1":
        pytest.fail(f"no Apache Kafka: {reason}")
    pytest.skip(f"not tested with Apache Kafka: {reason}")


# Mosquitto. Where it is not installed, the tests that ask for it are skipped, and say so; with
# KRONOS_REQUIRE_MOSQUITTO=1, as in CI, they fail instead.


@pytest.fixture
def make_mosquitto(tmp_path: Path) -> Callable[..., Mosquitto]:
    """Makes a broker, not yet started: ``mosquitto_of(users={"me": "secret"})``."""
    try:
        mosquitto_program()
    except MosquittoFailed as error:
        if os.environ.get("KRONOS_REQUIRE_MOSQUITTO") == "1":
            pytest.fail(f"no Mosquitto: {error}")
        pytest.skip(f"not tested with Mosquitto: {error}")
    return partial(Mosquitto, tmp_path / "mosquitto")


# Prometheus. Where it is not installed, the tests that ask for it are skipped, and say so; with
# KRONOS_REQUIRE_PROMETHEUS=1, as in CI, they fail instead.


@pytest.fixture
def make_prometheus(tmp_path: Path) -> Callable[[str], Prometheus]:
    """Makes one with a configuration, not yet started; its folder is ``prometheus``."""
    _require_prometheus("prometheus")
    return partial(Prometheus, tmp_path / "prometheus")


@pytest.fixture
def promtool() -> str:
    """The program that checks what Prometheus is given."""
    return _require_prometheus("promtool")


def _require_prometheus(name: str) -> str:
    try:
        return prometheus_program(name)
    except PrometheusFailed as error:
        if os.environ.get("KRONOS_REQUIRE_PROMETHEUS") == "1":
            pytest.fail(f"no Prometheus: {error}")
        pytest.skip(f"not tested with Prometheus: {error}")


@pytest.fixture(scope="session")
def metric_labels() -> dict[str, frozenset[str]]:
    """What a daemon tells Prometheus: names of samples and of histograms → labels."""
    metrics = Metrics()
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase) and metric._labelnames:
            metric.labels(*metric._labelnames)  # without any, it has no samples
    families = list(metrics.registry.collect())
    samples = [sample for family in families for sample in family.samples]
    found = {sample.name: frozenset(sample.labels) for sample in samples}
    histograms = {family.name for family in families if family.type == "histogram"}
    return found | {name: found[f"{name}_count"] for name in histograms}


# What bots read, without a daemon that says it.


@pytest.fixture(scope="session")
def make_forecast() -> Callable[..., Envelope]:
    """Makes a forecast of the newest closed bar: ``forecast_of("binance:BTC/USDT:5m")``.

    p_up: in twentieths. ago: bars by which it is out of date. reasons: why it is degraded.
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
