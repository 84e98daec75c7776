"""Findings of ``kronos-stream doctor``, with real venues, brokers and disks."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import (  # type: ignore[attr-defined] # it says so in no __all__
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)
from pydantic import SecretStr

from kronos_connectors.kafka.admin import create
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import required_topics
from tests.support.apache_kafka import ApacheKafka
from tests.support.exchange_process import ExchangeProcess
from tests.support.ports import free_port
from tests.support.processes import WAIT_SECONDS, settings_environment

PASSWORD = "open-sesame-12345"  # noqa: S105 - of this test alone


class DoctorReport:
    """Output and exit status of the command."""

    def __init__(self, ended: subprocess.CompletedProcess[str]) -> None:
        self.status, self.text = ended.returncode, ended.stdout + ended.stderr
        assert PASSWORD not in self.text
        self.findings: list[dict[str, str]] = json.loads(ended.stdout)["findings"]

    def of(self, name: str, level: str) -> str:
        """Findings of a check with their remedies, all of which must have the same level."""
        some = [one for one in self.findings if one["check"].startswith(name)]
        assert some, name
        assert {one["level"] for one in some} == {level}, some
        return "\n".join(f"{one['found']}; {one['cure']}" for one in some)


@pytest.fixture(scope="module")
def exchange() -> Iterator[ExchangeProcess]:
    with ExchangeProcess("--symbols", "2", "--history", "300") as exchange:
        yield exchange


@pytest.fixture
def environ(exchange: ExchangeProcess, tmp_path: Path) -> dict[str, str]:
    """Settings of a daemon that can run."""
    return {
        **exchange.settings(),
        "SINKS": "jsonl",
        "JSONL__PATH": str(tmp_path / "forecasts.jsonl"),
        "STATE_FILE": str(tmp_path / "state" / "state.sqlite"),
        "MODEL": "nano",
        "LOOKBACK": "96",
        "HORIZON": "8",
        "HTTP__PORT": "0",
        "HTTP__TOKEN": PASSWORD,
    }


def _doctor(given: Mapping[str, str], *skip: str) -> DoctorReport:
    arguments = [argument for area in skip for argument in ("--skip", area)]
    return DoctorReport(
        subprocess.run(
            [sys.executable, "-m", "kronos_stream", "doctor", "--json", *arguments],
            env=settings_environment(given),
            capture_output=True,
            text=True,
            check=False,
        )
    )


@pytest.mark.parametrize("symbols", ["binance:SIM00/USDT", "binance:*/USDT?top=2"])
def test_valid_setup_has_no_failures_and_leaves_no_files(
    symbols: str, environ: dict[str, str], tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    found = _doctor(environ | {"SYMBOLS": symbols})
    assert found.status == 0, found.text
    names = {one["check"] for one in found.findings}
    assert names == {
        "settings", "state file", "http port", "binance spot clock", "binance spot websocket",
        "binance symbols", "jsonl file", "model",
    }  # fmt: skip
    assert "HTTP__TOKEN=***" in found.of("settings", "ok")
    model = next(one for one in found.findings if one["check"] == "model")  # then maybe a warning
    assert model["level"] == "ok"
    assert "nano on cpu in float32" in model["found"]
    assert sorted(tmp_path.iterdir()) == before


def test_text_output_has_a_line_per_finding(environ: dict[str, str]) -> None:
    environ["SYMBOLS"] = "binance:SIM00/USDT,binance:SIM0/USDT"
    command = [sys.executable, "-m", "kronos_stream", "doctor", "--skip", "model"]
    ended = subprocess.run(
        command, env=settings_environment(environ), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    lines = ended.stdout.splitlines()
    assert {line[:6] for line in lines} == {"ok    ", "fail  "}
    (failed,) = (line for line in lines if line.startswith("fail"))
    assert "did you mean SIM0" in failed
    assert "see KRONOS_STREAM_SYMBOLS" in failed


def test_invalid_settings_are_the_only_findings(environ: dict[str, str]) -> None:
    found = _doctor(environ | {"HORIZON": "0", "LOKBACK": "9"}, "model")
    assert found.status == 2
    assert "did you mean KRONOS_STREAM_LOOKBACK?" in found.of("settings", "fail")
    short = "sesame"
    found = _doctor(environ | {"HORIZON": "0", "HTTP__TOKEN": short}, "model")
    finding = found.of("settings", "fail")
    assert "KRONOS_STREAM_HORIZON=0: " in finding
    assert "KRONOS_STREAM_HTTP__TOKEN: expected at least 16" in finding
    assert short not in found.text


def test_unreachable_services_are_named(environ: dict[str, str]) -> None:
    unused = f"127.0.0.1:{free_port()}"
    environ |= {"BINANCE__REST_URL": f"http://{unused}", "BINANCE__WS_URL": f"ws://{unused}"}
    environ |= {"SINKS": "kafka,jsonl", "KAFKA__BOOTSTRAP_SERVERS": unused}
    found = _doctor(environ | {"MODEL": "/nowhere"})
    assert found.status == 1
    for name in ("binance spot clock", "binance spot websocket", "binance symbols"):
        assert unused in found.of(name, "fail")
        assert "check that this machine reaches it" in found.of(name, "fail")
    assert "see KRONOS_STREAM_KAFKA__BOOTSTRAP_SERVERS" in found.of("kafka", "fail")
    assert "/nowhere" in found.of("model", "fail")
    assert "can be written" in found.of("jsonl", "ok")  # the others are looked at all the same


def test_unreadable_model_is_named(environ: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{", "utf-8")
    finding = _doctor(environ | {"MODEL": str(folder)}, "venues").of("model", "fail")
    assert str(folder) in finding
    assert "KRONOS_STREAM_LOOKBACK" in _doctor(environ | {"LOOKBACK": "250"}).of("model", "fail")


@pytest.mark.parametrize(("timeframe", "level"), [("1s", "fail"), ("5m", "warn")])
def test_skewed_clock_is_found(timeframe: str, level: str, environ: dict[str, str]) -> None:
    arguments = ("--timeframe", timeframe, "--faults", '{"skew_seconds": 2.5}', "--history", "120")
    with ExchangeProcess("--symbols", "1", *arguments) as skewed:
        found = _doctor(environ | skewed.settings(), "model")
    finding = found.of("binance spot clock", level)
    skew = re.search(r"our clock is ([\d.]+)", finding)
    assert skew is not None
    assert float(skew[1]) == pytest.approx(2.5, abs=1.0)  # the rest is the time of the request
    assert "behind the venue's" in finding
    assert "NTP" in finding
    assert found.status == (1 if level == "fail" else 0)


# Kafka.


def test_topics_are_checked(environ: dict[str, str], kafka: ApacheKafka, topic_prefix: str) -> None:
    environ |= {"SINKS": "kafka", "KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap}
    environ |= {"KAFKA__TOPIC_PREFIX": topic_prefix, "KAFKA__PARTITIONS": "3"}
    skip = ("model", "venues")
    found = _doctor(environ, *skip)
    assert found.status == 1
    finding = found.of("kafka", "fail")
    assert f"{topic_prefix}.forecasts.v1: missing" in finding
    assert "kronos-stream topics create" in finding
    options = KafkaOptions(bootstrap_servers=kafka.bootstrap, topic_prefix=topic_prefix)
    options = options.model_copy(update={"partitions": 3})
    asyncio.run(create(options, required_topics(options)))
    found = _doctor(environ, *skip)
    assert found.status == 0, found.text
    assert "3 topics are as they should be" in found.of("kafka", "ok")
    assert "right to write to 3 topics" in found.of("kafka", "ok")
    assert "3 partitions, not 4" in _doctor(environ | {"KAFKA__PARTITIONS": "4"}, *skip).text


@pytest.fixture(scope="module")
def secured_kafka_options(
    kafka_jars: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], KafkaOptions]]:
    """Kafka with logins: one user with all rights, one that may only read. Options by user."""
    users = {"owner": PASSWORD, "guest": PASSWORD}
    folder = tmp_path_factory.mktemp("secured")
    with ApacheKafka(kafka_jars, folder, users=users, super_users=["owner"]) as broker:

        def options(name: str) -> KafkaOptions:
            return KafkaOptions(
                bootstrap_servers=broker.bootstrap, security_protocol="SASL_PLAINTEXT",
                sasl_username=name, sasl_password=SecretStr(PASSWORD), partitions=3,
            )  # fmt: skip

        asyncio.run(create(options("owner"), required_topics(options("owner"))))
        _grant_describe(broker.bootstrap, "guest")
        yield options


def _grant_describe(bootstrap: str, user: str) -> None:
    login = {"sasl.mechanism": "PLAIN", "sasl.username": "owner", "sasl.password": PASSWORD}
    conf: dict[str, Any] = {
        "bootstrap.servers": bootstrap,
        "security.protocol": "SASL_PLAINTEXT",
        **login,
    }
    client = AdminClient(conf)
    for operation in (AclOperation.DESCRIBE, AclOperation.DESCRIBE_CONFIGS):
        rule = AclBinding(
            ResourceType.TOPIC, "kronos", ResourcePatternType.PREFIXED, f"User:{user}", "*",
            operation, AclPermissionType.ALLOW,
        )  # fmt: skip
        for done in client.create_acls([rule]).values():
            done.result(WAIT_SECONDS)


def _login(options: KafkaOptions, password: str = PASSWORD) -> dict[str, str]:
    return {
        "SINKS": "kafka",
        "KAFKA__BOOTSTRAP_SERVERS": options.bootstrap_servers,
        "KAFKA__SECURITY_PROTOCOL": "SASL_PLAINTEXT",
        "KAFKA__SASL_USERNAME": options.sasl_username,
        "KAFKA__SASL_PASSWORD": password,
        "KAFKA__PARTITIONS": "3",
    }


def test_wrong_password_and_missing_rights_are_different_findings(
    environ: dict[str, str], secured_kafka_options: Callable[[str], KafkaOptions]
) -> None:
    skip = ("model", "venues")
    found = _doctor(environ | _login(secured_kafka_options("owner")), *skip)
    assert found.status == 0, found.text
    assert "KAFKA__SASL_PASSWORD=***" in found.of("settings", "ok")

    found = _doctor(environ | _login(secured_kafka_options("owner"), "wrong"), *skip)
    assert found.status == 1
    finding = found.of("kafka", "fail")
    assert "uthentication failed" in finding, finding
    assert "see KRONOS_STREAM_KAFKA__SASL_USERNAME, KRONOS_STREAM_KAFKA__SASL_PASS" in finding

    found = _doctor(environ | _login(secured_kafka_options("guest")), *skip)
    assert found.status == 1
    assert "3 topics are as they should be" in found.text
    finding = found.text
    assert "kronos.forecasts.v1: no right to write to it" in finding
    assert "kafka-acls.sh --add --allow-principal User:guest --operation Write" in finding


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB; skips the test where it cannot be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder],  # noqa: S607
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)  # noqa: S607


def test_full_disk_is_found(environ: dict[str, str], small_disk: Path) -> None:
    environ["STATE_FILE"] = str(small_disk / "state.sqlite")
    assert "MiB free" in _doctor(environ, "model", "venues").of("state file", "fail")
    with (small_disk / "filler").open("wb") as file, pytest.raises(OSError, match="No space left"):
        file.write(bytes(2 * 2**20))
    environ["JSONL__PATH"] = str(small_disk / "forecasts.jsonl")
    found = _doctor(environ, "model", "venues")
    assert found.status == 1
    for name, setting in (("state file", "STATE_FILE"), ("jsonl file", "JSONL__PATH")):
        finding = found.of(name, "fail")
        assert "the disk is full; make room there" in finding
        assert setting in finding


def test_ctrl_c_ends_doctor_before_a_check_has_finished(environ: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts connections, and sends nothing
        environ["BINANCE__REST_URL"] = f"http://127.0.0.1:{mute.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-m", "kronos_stream", "doctor"],
            env=settings_environment(environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        seen = [process.stdout.readline() for _ in range(3)]
        connection, _ = mute.accept()  # the venue is being checked
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate()
        connection.close()
    assert all(line.startswith("ok") for line in seen)
    assert (process.returncode, rest, err.strip()) == (130, "", "")
