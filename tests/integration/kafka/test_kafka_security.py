"""Kafka with TLS and SASL on a real broker: accepted and refused connections."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
from pydantic import SecretStr, ValidationError

from kronos_connectors.kafka import SINK, SOURCE, admin
from kronos_connectors.kafka.checks import _warn_plaintext_password
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import required_topics
from kronos_stream.interfaces.diagnostics import CheckedSink, Finding
from kronos_stream.interfaces.sink import Record, SinkLoginRefused, SinkUnavailable
from kronos_stream.interfaces.source import LoginRefused, SourceError
from kronos_stream.market.clock import SystemClock
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from tests.support.apache_kafka import ApacheKafka, KafkaListener
from tests.support.certificates import CertificateAuthority

PASSWORD = "open-sesame-12345"  # noqa: S105 - of these tests alone
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
MINUTE = Timeframe.parse("1m")
SERIES = Series.parse("kafka:BTC/USDT:1m")


class SecuredKafka(NamedTuple):
    """A broker with several listeners, and its certificate authority."""

    kafka: ApacheKafka
    authority: CertificateAuthority
    untrusted_authority: CertificateAuthority

    def options(self, listener: str, protocol: str, **more: Any) -> KafkaOptions:
        """Options for a listener; with a login, that of ``owner``, who has all rights."""
        settings: dict[str, Any] = {
            "bootstrap_servers": self.kafka.bootstrap_for(listener),
            "security_protocol": protocol,
            "partitions": 3,
        }
        if protocol.startswith("SASL"):
            settings |= {"sasl_username": "owner", "sasl_password": SecretStr(PASSWORD)}
        if protocol.endswith("SSL"):
            settings["ssl_cafile"] = self.authority.file
        return KafkaOptions(**{**settings, **more})

    def client_certificate(self, by: CertificateAuthority, **more: Any) -> dict[str, Path]:
        """Options with a new client certificate."""
        issued = by.issue("client", **more)
        return {"ssl_certfile": issued.certificate, "ssl_keyfile": issued.key}


@pytest.fixture(scope="module")
def secured_kafka(
    kafka_jars: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SecuredKafka]:
    folder = tmp_path_factory.mktemp("secured")
    authority, untrusted = CertificateAuthority(folder), CertificateAuthority(folder, "untrusted")
    valid = authority.issue("broker")
    expired = authority.issue("expired", not_after=-timedelta(hours=1))
    elsewhere = authority.issue("elsewhere", ["elsewhere.example"])
    listeners = {
        "safe": KafkaListener(tls=valid, mechanisms=MECHANISMS),
        "scram": KafkaListener(tls=valid, mechanisms=["SCRAM-SHA-512"]),
        "mutual": KafkaListener(tls=valid, client_ca_file=authority.file),
        "expired": KafkaListener(tls=expired, mechanisms=["PLAIN"]),
        "elsewhere": KafkaListener(tls=elsewhere, mechanisms=["PLAIN"]),
        "open": KafkaListener(),
    }
    users = dict.fromkeys(("owner", "ingest", "forecast", "all", "bot"), PASSWORD)
    kafka = ApacheKafka(
        kafka_jars,
        folder / "kafka",
        users=users,
        listeners=listeners,
        super_users=["owner", "CN=client"],
    )
    with kafka:
        yield SecuredKafka(kafka, authority, untrusted)


def _record(sequence: int = 0) -> Record:
    now = time.time_ns() // 1_000_000
    return Record(sequence, "forecast", "binance:BTC/USDT:1m", b"{}", (("ce_id", b"1"),), now)


async def _run_checks(options: KafkaOptions) -> list[Finding]:
    """Run the checks of doctor."""
    sink = SINK.build(options, SystemClock(), Random(0))
    assert isinstance(sink, CheckedSink)
    return [finding for check in sink.checks() for finding in await check.run()]


async def _check_access(options: KafkaOptions) -> None:
    """Create topics, deliver forecasts, look for candles, and run doctor."""
    topics = required_topics(options, [MINUTE])
    await admin.create(options, topics)
    assert await admin.check(options, topics) == []
    sink = SINK.build(options, SystemClock(), Random(0))
    try:
        await sink.start()
        assert not await sink.deliver([_record(1), _record(2)])
    finally:
        await sink.close()
    source = SOURCE.build("kafka", options, SystemClock(), Random(0))
    assert await source.unsupported([SERIES]) == {}
    assert {finding.level for finding in await _run_checks(options)} == {"ok"}


@pytest.mark.parametrize("mechanism", MECHANISMS)
async def test_right_password_is_accepted(
    secured_kafka: SecuredKafka, mechanism: str, topic_prefix: str
) -> None:
    prefix = {"topic_prefix": topic_prefix}
    await _check_access(
        secured_kafka.options("safe", "SASL_SSL", sasl_mechanism=mechanism, **prefix)
    )


async def test_client_certificate_is_accepted(
    secured_kafka: SecuredKafka, topic_prefix: str
) -> None:
    """Its key is encrypted."""
    certificate = secured_kafka.client_certificate(secured_kafka.authority, password=PASSWORD)
    prefix = {"topic_prefix": topic_prefix}
    key = SecretStr(PASSWORD)
    await _check_access(
        secured_kafka.options("mutual", "SSL", **certificate, ssl_key_password=key, **prefix)
    )
    with pytest.raises(ValidationError, match="KAFKA__SSL_KEY_PASSWORD is not its password"):
        secured_kafka.options("mutual", "SSL", **certificate)


@pytest.mark.parametrize(
    ("hosts", "mechanism", "warned"),
    [
        ("kafka-1:9092", "PLAIN", True),
        ("127.0.0.1:9092,kafka-1:9092", "PLAIN", True),
        ("127.0.0.1:9092,localhost:9092", "PLAIN", False),
        ("kafka-1:9092", "SCRAM-SHA-512", False),
    ],
)
def test_doctor_warns_about_unencrypted_passwords(hosts: str, mechanism: Any, warned: bool) -> None:  # noqa: FBT001
    options = KafkaOptions(
        bootstrap_servers=hosts, security_protocol="SASL_PLAINTEXT", sasl_mechanism=mechanism,
        sasl_username="me", sasl_password=SecretStr(PASSWORD),
    )  # fmt: skip
    assert [one.level for one in _warn_plaintext_password(options)] == ["warn"] * warned


SEE = "see KRONOS_STREAM_KAFKA__"
SET = "set KRONOS_STREAM_KAFKA__"
Change = Callable[[SecuredKafka], Mapping[str, Any]]


def _nothing(_: SecuredKafka) -> Mapping[str, Any]:
    return {}


@pytest.mark.parametrize(
    ("listener", "protocol", "change", "cause", "remedy"),
    [
        *(
            pytest.param(
                "safe",
                "SASL_SSL",
                lambda _, mechanism=mechanism: {
                    "sasl_mechanism": mechanism,
                    "sasl_password": SecretStr("wrong-" + PASSWORD),
                },
                "login as owner refused",
                f"{SEE}SASL_USERNAME, KRONOS_STREAM_KAFKA__SASL_PASSWORD",
                id=f"wrong password, {mechanism}",
            )
            for mechanism in MECHANISMS
        ),
        pytest.param(
            "safe", "SASL_SSL", lambda _: {"sasl_username": "nobody"},
            "login as nobody refused", f"{SEE}SASL_USERNAME", id="unknown user",
        ),
        pytest.param(
            "scram", "SASL_SSL", _nothing,
            "does not support login by PLAIN", f"{SEE}SASL_MECHANISM", id="mechanism not offered",
        ),
        pytest.param(
            "safe", "SASL_SSL", lambda secured: {"ssl_cafile": secured.untrusted_authority.file},
            "not signed by a trusted authority (/", f"{SET}SSL_CAFILE", id="another authority",
        ),
        pytest.param(
            "safe", "SASL_SSL", lambda _: {"ssl_cafile": None},
            "trusted authority (the system's authorities)", f"{SET}SSL_CAFILE", id="no authority",
        ),
        pytest.param(
            "expired", "SASL_SSL", _nothing,
            "the broker's certificate has expired", "the broker needs a new one", id="expired",
        ),
        pytest.param(
            "elsewhere", "SASL_SSL", _nothing,
            "not valid for '127.0.0.1'", "in KRONOS_STREAM_KAFKA__BOOTSTRAP_SERVERS", id="host",
        ),
        pytest.param(
            "mutual", "SSL", _nothing,
            "the broker requires a client certificate", f"{SET}SSL_CERTFILE", id="no certificate",
        ),
        pytest.param(
            "mutual", "SSL",
            lambda secured: secured.client_certificate(secured.untrusted_authority),
            "rejects our certificate", "that the broker trusts its authority", id="a stranger's",
        ),
        pytest.param(
            "mutual", "SSL",
            lambda secured: secured.client_certificate(
                secured.authority, not_after=-timedelta(hours=1)
            ),
            "rejects our certificate", "is valid", id="ours has expired",
        ),
        pytest.param(
            "safe", "PLAINTEXT", _nothing,
            "requires TLS on this port", f"{SEE}SECURITY_PROTOCOL", id="plain to TLS",
        ),
        pytest.param(
            "safe", "SASL_PLAINTEXT", _nothing,
            "requires TLS on this port", f"{SEE}SECURITY_PROTOCOL", id="plain login to TLS",
        ),
        pytest.param(
            "mutual", "SASL_SSL", lambda secured: secured.client_certificate(secured.authority),
            "does not support logins", f"{SEE}SECURITY_PROTOCOL", id="login to no login",
        ),
    ],
)  # fmt: skip
async def test_refused_connection_is_reported_with_cause_and_remedy(
    secured_kafka: SecuredKafka,
    listener: str,
    protocol: str,
    change: Change,
    cause: str,
    remedy: str,
) -> None:
    options = secured_kafka.options(listener, protocol, **change(secured_kafka))
    for _ in range(5):
        # An alert that a broker sends after the handshake may be lost with the connection.
        with suppress(AssertionError):
            message, permanent = await _error_message(options)
            if permanent or listener != "mutual":
                break
    else:
        message, permanent = await _error_message(options)
    assert permanent
    assert cause in message
    assert remedy in message


@pytest.mark.parametrize(("listener", "protocol"), [("open", "SASL_SSL"), ("safe", "SSL")])
async def test_closed_connection_is_no_permanent_error(
    secured_kafka: SecuredKafka, listener: str, protocol: str
) -> None:
    """The broker may be starting, so the connection is tried again."""
    message, permanent = await _error_message(secured_kafka.options(listener, protocol))
    assert not permanent
    assert f"at once, maybe it does not expect {protocol}; {SEE}SECURITY" in message


async def test_certificate_that_becomes_invalid_is_reported(secured_kafka: SecuredKafka) -> None:
    """Certificates are read for each connection, since they may be renewed."""
    certificate = secured_kafka.client_certificate(secured_kafka.authority)
    options = secured_kafka.options("mutual", "SSL", **certificate)
    certificate["ssl_certfile"].write_text("invalid", "utf-8")
    message, permanent = await _error_message(options)
    assert permanent
    assert (
        f"certificate or key cannot be used: {certificate['ssl_keyfile']}: it is not PEM" in message
    )


async def _error_message(options: KafkaOptions) -> tuple[str, bool]:
    """Error that keeps a sink out, and whether it lasts until the user acts."""
    began = time.monotonic()
    sink = SINK.build(options, SystemClock(), Random(0))
    with pytest.raises(SinkUnavailable) as sink_error:
        await sink.start()
    await sink.close()
    message, permanent = str(sink_error.value), isinstance(sink_error.value, SinkLoginRefused)
    source = SOURCE.build("kafka", options, SystemClock(), Random(0))
    with pytest.raises(SourceError) as source_error:
        await source.unsupported([SERIES])
    with pytest.raises(admin.TopicsError) as admin_error:
        await admin.check(options, [])
    (finding,) = await _run_checks(options)
    assert time.monotonic() - began < 60
    assert str(source_error.value) == f"kafka: {message}"
    assert isinstance(source_error.value, LoginRefused) is permanent
    assert str(admin_error.value).endswith(message)
    assert finding.level == "fail"
    assert f"{finding.found}; {finding.remedy}".endswith(message) or not admin_error.value.remedy
    assert PASSWORD not in message
    assert "\n" not in message
    return message, permanent
