"""``kronos-stream topics`` on Apache Kafka, and settings of Kafka."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from click.testing import CliRunner, Result
from pydantic import ValidationError

from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import candle_topic, required_topics
from kronos_stream.commands.topics import topics
from kronos_stream.daemon.config.settings import SettingsError
from kronos_stream.market.timeframe import Timeframe
from tests.support.apache_kafka import ApacheKafka

Run = Callable[..., Result]


@pytest.fixture
def run(topic_prefix: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run ``kronos-stream topics`` with settings of Kafka."""

    def command(*arguments: str, **settings: object) -> Result:
        monkeypatch.setenv("KRONOS_STREAM_KAFKA__TOPIC_PREFIX", topic_prefix)
        for name, value in settings.items():
            monkeypatch.setenv(f"KRONOS_STREAM_KAFKA__{name}", str(value))
        return CliRunner().invoke(topics, arguments)

    return command


def test_created_topics_pass_the_check_and_remain_unchanged(
    kafka: ApacheKafka, run: Run, topic_prefix: str
) -> None:
    where = {"BOOTSTRAP_SERVERS": kafka.bootstrap, "PARTITIONS": 5}
    missing = run("check", **where)
    assert missing.exit_code == 2
    lines = missing.stderr.splitlines()
    assert len(lines) == 3
    assert all("kronos-stream topics create" in line for line in lines)

    made = run("create", "--candles", "1m,1M", **where)
    assert made.exit_code == 0, made.output
    assert f"{topic_prefix}.forecasts.v1: created, 5 partitions, 1 replicas" in made.stdout
    again = run("create", "--candles", "1m,1M", **where)
    assert again.exit_code == 0
    assert again.stdout.count(": exists") == 5
    assert run("check", "--candles", "1M", **where).exit_code == 0


@pytest.mark.parametrize(
    ("settings", "timeframes"),
    [
        ({"ROLE": "forecast", "TIMEFRAMES": "1m,1M"}, ["1M", "1m"]),
        ({"ROLE": "ingest", "TIMEFRAMES": "5m", "SYMBOLS": "binance:A/B"}, ["5m"]),
        ({"TIMEFRAMES": "5m", "SYMBOLS": "binance:A/B"}, []),
    ],
)
def test_candle_topics_depend_on_the_role(
    run: Run,
    topic_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    kafka: ApacheKafka,
    settings: dict[str, str],
    timeframes: list[str],
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(f"KRONOS_STREAM_{name}", value)
    made = run("create", BOOTSTRAP_SERVERS=kafka.bootstrap, PARTITIONS=1)
    assert made.exit_code == 0, made.output
    found = [one for one in made.stdout.splitlines() if ".candles." in one]
    assert sorted(one.partition(":")[0] for one in found) == [
        f"{topic_prefix}.candles.{one}.v1" for one in timeframes
    ]


def test_differences_are_reported_with_remedies(
    kafka: ApacheKafka, run: Run, topic_prefix: str
) -> None:
    async def make() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
        await admin.start()
        configs = {"retention.ms": "1000", "min.insync.replicas": "2"}
        await admin.create_topics(
            [
                NewTopic(f"{topic_prefix}.forecasts.v1", 4, 1, topic_configs=configs),
                NewTopic(f"{topic_prefix}.forecasts.latest.v1", 4, 1),
            ]
        )
        await admin.close()

    asyncio.run(make())
    found = run("create", BOOTSTRAP_SERVERS=kafka.bootstrap, PARTITIONS=8)
    assert found.exit_code == 2
    problems = found.stderr
    assert "forecasts.v1: 4 partitions, not 8" in problems
    assert "KRONOS_STREAM_KAFKA__PARTITIONS=4" in problems
    assert "forecasts.v1: retention.ms is 1000, not 604800000" in problems
    assert "min.insync.replicas is 2, not 1" in problems
    assert "forecasts.latest.v1: cleanup.policy is delete, not compact" in problems
    assert f"--bootstrap-server {kafka.bootstrap} --alter" in problems
    assert "deadletter" not in problems  # it was created


def test_invalid_settings_are_reported(run: Run) -> None:
    for settings, message in (
        ({}, "KRONOS_STREAM_KAFKA__BOOTSTRAP_SERVERS is required: set it, such as localhost:9092"),
        ({"BOOTSTRAP_SERVERS": "x:1", "PARTITIONS": 0}, "KRONOS_STREAM_KAFKA__PARTITIONS: "),
        (
            {"BOOTSTRAP_SERVERS": "x:1", "PARTITION": 3},
            "did you mean KRONOS_STREAM_KAFKA__PARTITIONS",
        ),
    ):
        raised = run("check", **settings).exception
        assert isinstance(raised, SettingsError)
        assert message in str(raised)
    result = run("check", "--candles", "5x", BOOTSTRAP_SERVERS="x:1", PARTITIONS=1)
    assert result.exit_code == 2
    assert "timeframe '5x'" in result.stderr


def test_unreachable_broker_is_reported_in_one_line(run: Run) -> None:
    result = run("check", BOOTSTRAP_SERVERS="127.0.0.1:1")
    assert result.exit_code == 1
    assert "127.0.0.1:1" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_candle_topics_retain_twice_the_longest_context() -> None:
    options = KafkaOptions(bootstrap_servers="x:1")
    timeframes = [Timeframe.parse(text) for text in ("1s", "1h", "1M")]
    configs = {topic.name: topic.configs for topic in required_topics(options, timeframes)}
    days = [
        int(configs[candle_topic("kronos", timeframe)]["retention.ms"]) / 86_400_000
        for timeframe in timeframes[:2]
    ]
    assert days[0] == 7
    assert days[1] * 24 >= 2 * 2048
    assert configs["kronos.candles.1M.v1"]["retention.ms"] == "-1"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"security_protocol": "SASL_SSL"}, "needs sasl_username and sasl_password"),
        ({"sasl_username": "me"}, "has no login"),
        (
            {"security_protocol": "SSL", "ssl_cafile": "/nowhere.pem"},
            "/nowhere.pem: no such file",
        ),
        ({"ssl_cafile": "/nowhere.pem"}, "PLAINTEXT does not encrypt"),
        ({"topic_prefix": "a b"}, "topic_prefix"),
        ({"bootstrap": "x:1"}, "bootstrap"),
    ],
)
def test_contradictory_options_are_refused(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        KafkaOptions(**{"bootstrap_servers": "x:1", **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("servers", ["localhost", "h:99999", ",,", "me:secret@h:9092", "h:9092,"])
def test_invalid_addresses_are_refused(servers: str) -> None:
    with pytest.raises(ValidationError, match="expected host:port") as raised:
        KafkaOptions(bootstrap_servers=servers)
    assert "secret" not in raised.value.errors()[0]["msg"]


def test_password_is_not_shown() -> None:
    options = KafkaOptions(
        bootstrap_servers="x:1",
        security_protocol="SASL_SSL",
        sasl_username="me",
        sasl_password="hunter2",  # type: ignore[arg-type]  # noqa: S106
    )
    assert "hunter2" not in f"{options} {options!r} {options.model_dump()}"
    assert options.client_arguments()["sasl_plain_password"] == "hunter2"  # noqa: S105
