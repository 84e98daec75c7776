"""Kafka with TLS and SASL, on a real broker: who gets in, and what is said to who does not."""

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
WAYS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
MINUTE = Timeframe.parse("1m")
SERIES = Series.parse("kafka:BTC/USDT:1m")


class SecuredKafka(NamedTuple):
    """A broker with several doors, and who signs certificates for it."""

    kafka: ApacheKafka
    authority: CertificateAuthority
    untrusted_authority: CertificateAuthority

    def options(self, door: str, protocol: str, **more: Any) -> KafkaOptions:
        """As ``owner``, who may do anything, where there is a login."""
        given: dict[str, Any] = {
            "bootstrap_servers": self.kafka.bootstrap_for(door),
            "security_protocol": protocol,
            "partitions": 3,
        }
        if protocol.startswith("SASL"):
            given |= {"sasl_username": "owner", "sasl_password": SecretStr(PASSWORD)}
        if protocol.endswith("SSL"):
            given["ssl_cafile"] = self.authority.file
        return KafkaOptions(**{**given, **more})

    def certified(self, by: CertificateAuthority, **how: Any) -> dict[str, Path]:
        """A certificate of our own, as options."""
        ours = by.issue("client", **how)
        return {"ssl_certfile": ours.certificate, "ssl_keyfile": ours.key}


@pytest.fixture(scope="module")
def secured_kafka(
    kafka_jars: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SecuredKafka]:
    folder = tmp_path_factory.mktemp("locked")
    authority, stranger = CertificateAuthority(folder), CertificateAuthority(folder, "stranger")
    ours = authority.issue("broker")
    expired = authority.issue("expired", not_after=-timedelta(hours=1))
    elsewhere = authority.issue("elsewhere", ["elsewhere.example"])
    doors = {
        "safe": KafkaListener(tls=ours, mechanisms=WAYS),
        "scram": KafkaListener(tls=ours, mechanisms=["SCRAM-SHA-512"]),
        "mutual": KafkaListener(tls=ours, client_ca_file=authority.file),
        "expired": KafkaListener(tls=expired, mechanisms=["PLAIN"]),
        "elsewhere": KafkaListener(tls=elsewhere, mechanisms=["PLAIN"]),
        "open": KafkaListener(),
    }
    settings = {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS;User:owner;User:CN=client",
    }
    users = dict.fromkeys(("owner", "ingest", "forecast", "all", "bot"), PASSWORD)
    kafka = ApacheKafka(
        kafka_jars, folder / "kafka", users=users, listeners=doors, settings=settings
    )
    with kafka:
        yield SecuredKafka(kafka, authority, stranger)


def _record(sequence: int = 0) -> Record:
    now = time.time_ns() // 1_000_000
    return Record(sequence, "forecast", "binance:BTC/USDT:1m", b"{}", (("ce_id", b"1"),), now)


async def _run_checks(options: KafkaOptions) -> list[Finding]:
    """By doctor."""
    sink = SINK.build(options, SystemClock(), Random(0))
    assert isinstance(sink, CheckedSink)
    return [finding for check in sink.checks() for finding in await check.run()]


async def _check_access(options: KafkaOptions) -> None:
    """Topics are made, forecasts delivered, candles looked for, and doctor finds nothing wrong."""
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


@pytest.mark.parametrize("way", WAYS)
async def test_who_knows_the_password_gets_in(
    secured_kafka: SecuredKafka, way: str, topic_prefix: str
) -> None:
    prefix = {"topic_prefix": topic_prefix}
    await _check_access(secured_kafka.options("safe", "SASL_SSL", sasl_mechanism=way, **prefix))


async def test_who_has_a_certificate_gets_in(
    secured_kafka: SecuredKafka, topic_prefix: str
) -> None:
    """Also one whose key is encrypted."""
    ours = secured_kafka.certified(secured_kafka.authority, password=PASSWORD)
    prefix = {"topic_prefix": topic_prefix}
    key = SecretStr(PASSWORD)
    await _check_access(
        secured_kafka.options("mutual", "SSL", **ours, ssl_key_password=key, **prefix)
    )
    with pytest.raises(ValidationError, match="KAFKA__SSL_KEY_PASSWORD is not its password"):
        secured_kafka.options("mutual", "SSL", **ours)


@pytest.mark.parametrize(
    ("hosts", "way", "warned"),
    [
        ("kafka-1:9092", "PLAIN", True),
        ("127.0.0.1:9092,kafka-1:9092", "PLAIN", True),
        ("127.0.0.1:9092,localhost:9092", "PLAIN", False),
        ("kafka-1:9092", "SCRAM-SHA-512", False),
    ],
)
def test_a_password_that_travels_in_the_clear_is_told(hosts: str, way: Any, warned: bool) -> None:  # noqa: FBT001
    options = KafkaOptions(
        bootstrap_servers=hosts, security_protocol="SASL_PLAINTEXT", sasl_mechanism=way,
        sasl_username="me", sasl_password=SecretStr(PASSWORD),
    )  # fmt: skip
    assert [one.level for one in _warn_plaintext_password(options)] == ["warn"] * warned


SEE = "see KRONOS_STREAM_KAFKA__"
SET = "set KRONOS_STREAM_KAFKA__"
Change = Callable[[SecuredKafka], Mapping[str, Any]]


def _nothing(_: SecuredKafka) -> Mapping[str, Any]:
    return {}


@pytest.mark.parametrize(
    ("door", "protocol", "change", "cause", "cure"),
    [
        *(
            pytest.param(
                "safe",
                "SASL_SSL",
                lambda _, way=way: {
                    "sasl_mechanism": way,
                    "sasl_password": SecretStr("wrong-" + PASSWORD),
                },
                "login as owner refused",
                f"{SEE}SASL_USERNAME, KRONOS_STREAM_KAFKA__SASL_PASSWORD",
                id=f"wrong password, {way}",
            )
            for way in WAYS
        ),
        pytest.param(
            "safe", "SASL_SSL", lambda _: {"sasl_username": "nobody"},
            "login as nobody refused", f"{SEE}SASL_USERNAME", id="unknown user",
        ),
        pytest.param(
            "scram", "SASL_SSL", _nothing,
            "no login by PLAIN there", f"{SEE}SASL_MECHANISM", id="mechanism not offered",
        ),
        pytest.param(
            "safe", "SASL_SSL", lambda locked: {"ssl_cafile": locked.stranger.file},
            "signed by nobody that we trust (/", f"{SET}SSL_CAFILE", id="another authority",
        ),
        pytest.param(
            "safe", "SASL_SSL", lambda _: {"ssl_cafile": None},
            "that we trust (the system's authorities)", f"{SET}SSL_CAFILE", id="no authority",
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
            "the broker asks for a certificate of ours", f"{SET}SSL_CERTFILE", id="no certificate",
        ),
        pytest.param(
            "mutual", "SSL", lambda locked: locked.certified(locked.stranger),
            "turns our certificate down", "signed by whom the broker trusts", id="a stranger's",
        ),
        pytest.param(
            "mutual", "SSL",
            lambda locked: locked.certified(locked.authority, ends=-timedelta(hours=1)),
            "turns our certificate down", "is still valid", id="ours has expired",
        ),
        pytest.param(
            "safe", "PLAINTEXT", _nothing,
            "it speaks TLS there", f"{SEE}SECURITY_PROTOCOL", id="plain to TLS",
        ),
        pytest.param(
            "safe", "SASL_PLAINTEXT", _nothing,
            "it speaks TLS there", f"{SEE}SECURITY_PROTOCOL", id="plain login to TLS",
        ),
        pytest.param(
            "mutual", "SASL_SSL", lambda locked: locked.certified(locked.authority),
            "it takes no login there", f"{SEE}SECURITY_PROTOCOL", id="login to no login",
        ),
    ],
)  # fmt: skip
async def test_who_does_not_get_in_is_told_why_and_what_to_do(
    locked: SecuredKafka, door: str, protocol: str, change: Change, cause: str, cure: str
) -> None:
    options = locked.options(door, protocol, **change(locked))
    for _ in range(5):
        # What a broker says after the handshake may be lost with the connection.
        with suppress(AssertionError):
            said, final = await _error_message(options)
            if final or door != "mutual":
                break
    else:
        said, final = await _error_message(options)
    assert final
    assert cause in said
    assert cure in said


@pytest.mark.parametrize(("door", "protocol"), [("open", "SASL_SSL"), ("safe", "SSL")])
async def test_a_broker_that_hangs_up_may_be_meant_otherwise(
    secured_kafka: SecuredKafka, door: str, protocol: str
) -> None:
    """It may as well be starting: it is tried again."""
    said, final = await _error_message(secured_kafka.options(door, protocol))
    assert not final
    assert f"hung up at once, as if {protocol} were not what it speaks; {SEE}SECURITY" in said


async def test_a_certificate_that_is_spoiled_later_is_told(secured_kafka: SecuredKafka) -> None:
    """They are read at each connection, as they are renewed while a daemon runs."""
    ours = secured_kafka.certified(secured_kafka.authority)
    options = secured_kafka.options("mutual", "SSL", **ours)
    ours["ssl_certfile"].write_text("spoiled", "utf-8")
    said, final = await _error_message(options)
    assert final
    assert f"certificate or key cannot be used: {ours['ssl_keyfile']}: it is not PEM" in said


async def _error_message(options: KafkaOptions) -> tuple[str, bool]:
    """Error that keeps a sink out, and whether it lasts until the user acts."""
    began = time.monotonic()
    sink = SINK.build(options, SystemClock(), Random(0))
    with pytest.raises(SinkUnavailable) as refused:
        await sink.start()
    await sink.close()
    said, final = str(refused.value), isinstance(refused.value, SinkLoginRefused)
    source = SOURCE.build("kafka", options, SystemClock(), Random(0))
    with pytest.raises(SourceError) as unknown:
        await source.unsupported([SERIES])
    with pytest.raises(admin.TopicsError) as denied:
        await admin.check(options, [])
    (finding,) = await _run_checks(options)
    assert time.monotonic() - began < 60
    # All say the same.
    assert str(unknown.value) == f"kafka: {said}"
    assert isinstance(unknown.value, LoginRefused) is final
    assert str(denied.value).endswith(said)
    assert finding.level == "fail"
    assert f"{finding.found}; {finding.remedy}".endswith(said) or not denied.value.remedy
    assert PASSWORD not in said
    assert "\n" not in said
    return said, final
