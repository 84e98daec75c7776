"""The daemon on Kafka with TLS, SCRAM logins and the access rules of the documentation."""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import NamedTuple

import orjson
import pytest
from confluent_kafka.admin import (  # type: ignore[attr-defined] # it says so in no __all__
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from kronos_connectors.kafka import SINK
from kronos_connectors.kafka.options import KafkaOptions
from kronos_stream.interfaces.sink import Record, SinkLoginRefused, SinkUnavailable
from kronos_stream.market.clock import SystemClock
from tests.support.apache_kafka import ApacheKafka, KafkaListener
from tests.support.certificates import CertificateAuthority
from tests.support.daemon_process import DaemonProcess
from tests.support.exchange_process import ExchangeProcess
from tests.support.paths import ROOT
from tests.support.processes import COMMAND, WAIT_SECONDS, settings_environment, wait_for

PASSWORD = "open-sesame-12345"  # noqa: S105 - of these tests alone
PAGE = ROOT / "docs" / "security.md"
USERS = ("owner", "topics", "all", "ingest", "forecast", "bot")


class SecuredKafka(NamedTuple):
    """A broker with TLS, SCRAM and the access rules of the documentation."""

    kafka: ApacheKafka
    cafile: Path
    admin: AdminClient

    def settings(self, user: str, password: str = PASSWORD) -> dict[str, str]:
        return {
            "KAFKA__BOOTSTRAP_SERVERS": self.kafka.bootstrap_for("safe"),
            "KAFKA__SECURITY_PROTOCOL": "SASL_SSL",
            "KAFKA__SASL_MECHANISM": "SCRAM-SHA-512",
            "KAFKA__SASL_USERNAME": user,
            "KAFKA__SASL_PASSWORD": password,
            "KAFKA__SSL_CAFILE": str(self.cafile),
            "KAFKA__PARTITIONS": "2",
        }

    def allow(self, user: str, topic: str, operation: str) -> None:
        rule = AclBinding(
            ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, f"User:{user}", "*",
            AclOperation[operation], AclPermissionType.ALLOW,
        )  # fmt: skip
        for done in self.admin.create_acls([rule]).values():
            done.result(WAIT_SECONDS)

    def change_password(self, user: str, password: str) -> None:
        scram = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        change = UserScramCredentialUpsertion(user, scram, password.encode())
        for done in self.admin.alter_user_scram_credentials([change]).values():
            done.result(WAIT_SECONDS)


@pytest.fixture(scope="module")
def secured_kafka(
    kafka_jars: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SecuredKafka]:
    folder = tmp_path_factory.mktemp("secured")
    authority = CertificateAuthority(folder)
    listeners = {
        "safe": KafkaListener(tls=authority.issue("broker"), mechanisms=["SCRAM-SHA-512", "PLAIN"])
    }
    users = dict.fromkeys(USERS, PASSWORD)
    kafka = ApacheKafka(
        kafka_jars, folder / "kafka", users=users, listeners=listeners, super_users=["owner"]
    )
    with kafka:
        client = AdminClient(
            {
                "bootstrap.servers": kafka.bootstrap_for("safe"),
                "security.protocol": "SASL_SSL",
                "ssl.ca.location": str(authority.file),
                "sasl.mechanism": "SCRAM-SHA-512",
                "sasl.username": "owner",
                "sasl.password": PASSWORD,
            }
        )
        secured = SecuredKafka(kafka, authority.file, client)
        for done in client.create_acls(_rules(PAGE.read_text("utf-8"))).values():
            done.result(WAIT_SECONDS)
        _command(secured.settings("topics"), "topics", "create", "--candles", "1s")
        yield secured


def _rules(page: str) -> list[AclBinding]:
    """Access rules of the kafka-acls.sh commands on a page."""
    rules = []
    for line in re.findall(r"^kafka-acls\.sh (.*)$", page.replace("\\\n", " "), re.MULTILINE):
        words = shlex.split(line)
        details = dict(pairwise(words))
        kind = ResourceType.TOPIC if "--topic" in details else ResourceType.GROUP
        name = details.get("--topic") or details["--group"]
        how = details.get("--resource-pattern-type", "literal").upper()
        for word, operation in pairwise(words):
            if word == "--operation":
                code = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", operation).upper()
                rules.append(
                    AclBinding(
                        kind, name, ResourcePatternType[how], details["--allow-principal"], "*",
                        AclOperation[code], AclPermissionType.ALLOW,
                    )
                )  # fmt: skip
    return rules


@pytest.fixture(scope="module")
def exchange() -> Iterator[ExchangeProcess]:
    arguments = ("--symbols", "2", "--timeframe", "1s", "--history", "200")
    with ExchangeProcess(*arguments) as exchange:
        yield exchange


def _command(
    given: Mapping[str, str], *arguments: str, status: int = 0
) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(
        [*COMMAND, *arguments],
        env=settings_environment(given), capture_output=True, text=True, check=False,
    )  # fmt: skip
    output = ended.stdout + ended.stderr
    assert PASSWORD not in output
    assert ended.returncode == status, output
    return ended


def _model_settings() -> dict[str, str]:
    return {"MODEL": "nano", "LOOKBACK": "96", "HORIZON": "8", "PATHS": "20", "THREADS": "1"}


def _all(kafka: SecuredKafka, exchange: ExchangeProcess) -> dict[str, str]:
    return {"SINKS": "kafka", **exchange.settings(), **_model_settings(), **kafka.settings("all")}


def _consumed(kafka: SecuredKafka, count: int) -> list[str]:
    """Series of the first ``count`` forecasts that a bot reads."""
    command = [*COMMAND, "tail", "--json"]
    with subprocess.Popen(
        command, env=settings_environment(kafka.settings("bot")), stdout=subprocess.PIPE, text=True
    ) as tail:
        assert tail.stdout is not None
        received: list[str] = []
        while len(received) < count:
            received.append(orjson.loads(tail.stdout.readline())["series"])
        tail.terminate()
    return received


def test_each_role_works_with_its_documented_rights(
    secured_kafka: SecuredKafka, exchange: ExchangeProcess, tmp_path: Path
) -> None:
    for role in ("ingest", "forecast"):
        (tmp_path / role).mkdir()
    intake = {**exchange.settings(), **secured_kafka.settings("ingest"), "ROLE": "ingest"}
    engine = {
        **_model_settings(),
        **secured_kafka.settings("forecast"),
        "ROLE": "forecast",
        "SINKS": "kafka",
    }
    engine["TIMEFRAMES"] = "1s"
    with (
        DaemonProcess(tmp_path / "ingest", intake) as ingest,
        DaemonProcess(tmp_path / "forecast", engine) as forecast,
    ):
        ingest.start()
        forecast.start()
        ingest.wait_until_ready()
        forecast.wait_until_ready()
        assert set(_consumed(secured_kafka, 4)) == {one.name for one in exchange.series()}
        assert ingest.stop() == 0
        assert forecast.stop() == 0
    for role, given in (("ingest", intake), ("forecast", engine)):
        output = _command(given, "doctor", "--skip", "model", "--skip", "state").stdout
        assert "fail" not in output, role


def test_missing_right_is_named_by_doctor(
    secured_kafka: SecuredKafka, exchange: ExchangeProcess
) -> None:
    skip = ("--skip", "model", "--skip", "state", "--skip", "venues")
    given = {**_all(secured_kafka, exchange), **secured_kafka.settings("bot")}
    output = _command(given, "doctor", *skip, status=1).stdout
    assert "warn  kafka: kronos.forecasts.v1: no right to see its settings; to grant" in output
    assert "fail  kafka: kronos.forecasts.v1: no right to write to it" in output
    assert "--allow-principal User:bot --operation Write --operation Describe" in output
    given = {**secured_kafka.settings("ingest"), "ROLE": "forecast", "SINKS": "jsonl"}
    given |= {"TIMEFRAMES": "1s", "JSONL__PATH": "/dev/null"}
    output = _command(given, "doctor", "--skip", "model", "--skip", "sinks", status=1).stdout
    assert "kafka candles: kronos.candles.1s.v1: no right to read it" in output
    assert "--allow-principal User:ingest --operation Read" in output


async def test_delivery_without_a_right_names_it(secured_kafka: SecuredKafka) -> None:
    given = {name.lower(): value for name, value in secured_kafka.settings("ingest").items()}
    options = KafkaOptions(**{name.removeprefix("kafka__"): v for name, v in given.items()})  # type: ignore[arg-type]
    sink = SINK.build(options, SystemClock(), Random(0))
    now = time.time_ns() // 1_000_000
    try:
        with pytest.raises(SinkUnavailable, match=r"no topic kronos\.forecasts.*or no right to"):
            await sink.start()
        for topic in ("kronos.forecasts.v1", "kronos.forecasts.latest.v1"):
            secured_kafka.allow("ingest", topic, "DESCRIBE")
        await sink.start()
        with pytest.raises(SinkUnavailable, match=r"no right to the topic .*kafka-acls") as refused:
            await sink.deliver([Record(1, "forecast", "binance:A/B:1s", b"{}", (), now)])
        assert "kronos.forecasts." in str(refused.value)
        assert not isinstance(refused.value, SinkLoginRefused)  # records are kept
    finally:
        await sink.close()


def test_changed_password_is_logged_once_and_delivery_continues(
    secured_kafka: SecuredKafka, exchange: ExchangeProcess, tmp_path: Path
) -> None:
    with DaemonProcess(tmp_path, _all(secured_kafka, exchange)) as daemon:
        daemon.start()
        daemon.wait_until_ready()
        assert _consumed(secured_kafka, 2)
        secured_kafka.change_password("all", "another-12345")
        secured_kafka.kafka.kill()  # otherwise open connections would stay logged in
        secured_kafka.kafka.start()
        try:
            why = "login as all refused"
            wait_for(why, lambda: why in daemon.readiness()[1].get("sink kafka", ""))
            assert daemon.readiness()[0] == 503
            failures = daemon.metric("kronos_sink_failures_total")
            wait_for(
                "more tries", lambda: daemon.metric("kronos_sink_failures_total") > failures + 2
            )
        finally:
            secured_kafka.change_password("all", PASSWORD)
        daemon.wait_until_ready()
        details = [event for event in daemon.log_records() if why in str(event.get("why"))]
        assert [event["level"] for event in details] == ["warning"]
        assert daemon.stop() == 0
        assert daemon.undelivered() == 0
        assert PASSWORD not in daemon.log_file.read_text("utf-8")


def test_wrong_password_at_start_ends_the_daemon_or_is_retried(
    secured_kafka: SecuredKafka, exchange: ExchangeProcess, tmp_path: Path
) -> None:
    given = {**_all(secured_kafka, exchange), **secured_kafka.settings("all", "wrong-12345")}
    given |= {"KAFKA__SASL_MECHANISM": "PLAIN", "LOG__LEVEL": "debug"}  # the password travels
    with DaemonProcess(tmp_path, given) as daemon:
        daemon.start()
        assert daemon.wait() == 2
        output = daemon.log_file.read_text("utf-8")
        (line,) = (line for line in output.splitlines() if "login as all refused" in line)
        assert line.startswith("kronos-stream: error: ")
        assert "see KRONOS_STREAM_KAFKA__SASL_USERNAME" in line
        assert "Traceback" not in output
        assert "wrong-12345" not in output
    with DaemonProcess(tmp_path, {**given, "LOGIN_REFUSED": "retry"}) as daemon:
        daemon.start()
        why = "login as all refused"
        wait_for(why, lambda: why in daemon.readiness()[1].get("sink kafka", ""))
        wait_for("it is retried", lambda: daemon.metric("kronos_sink_failures_total") > 3)
        details = [event for event in daemon.log_records() if why in str(event.get("why"))]
        assert [event["level"] for event in details] == ["warning"]
        assert daemon.stop() == 0
