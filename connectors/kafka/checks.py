"""What ``kronos-stream doctor`` asks the brokers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, Literal

from aiokafka.errors import IncompatibleBrokerVersion
from confluent_kafka import KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient

from kronos_connectors._shared import tls
from kronos_connectors.kafka import admin
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import TopicSpec, deadletter_topic, required_topics
from kronos_stream.interfaces.diagnostics import Check, Finding
from kronos_stream.market.timeframe import Timeframe

_CHECK_TIMEOUT_SECONDS, _REQUEST_TIMEOUT_SECONDS = 50.0, 15.0

_silent_logger = logging.getLogger("kronos_connectors.kafka.librdkafka")
_silent_logger.disabled = True  # what it has to say is in its errors, too


Operation = Literal["Read", "Write"]


def checks(options: KafkaOptions, topic_names: Collection[str]) -> Sequence[Check]:
    """Whether the brokers let us in, the topics are as they should be, and ours to write to.

    names: of those topics that matter.
    """
    topics = [topic for topic in required_topics(options) if topic.name in topic_names]
    return [
        Check("kafka", partial(_check_topics, options, topics, "Write"), _CHECK_TIMEOUT_SECONDS)
    ]


def candle_checks(
    options: KafkaOptions, timeframes: Sequence[Timeframe], operation: Operation
) -> Sequence[Check]:
    """The same of the topics of candles, which are ours to write to, or to read."""
    others = {topic.name for topic in required_topics(options)}
    if operation == "Write":
        others.discard(deadletter_topic(options.topic_prefix))
    topics = [topic for topic in required_topics(options, timeframes) if topic.name not in others]
    lacking = f"kronos-stream topics create --candles {','.join(map(str, timeframes))}"
    return [
        Check(
            "kafka candles",
            partial(_check_topics, options, topics, operation, lacking),
            _CHECK_TIMEOUT_SECONDS,
        )
    ]


async def _check_topics(
    options: KafkaOptions,
    topics: Sequence[TopicSpec],
    operation: Operation,
    create_command: str = "",
) -> Sequence[Finding]:
    """The login is tried by asking for the topics. lacking: the command that creates them."""
    try:
        problems = await admin.check(options, topics)
    except admin.TopicsError as error:
        if isinstance(error.__cause__, IncompatibleBrokerVersion):
            return [Finding("warn", str(error), "fine for trying things out, and not to rely on")]
        return [Finding("fail", error.reason, error.remedy or _connection_remedy(options))]
    if create_command:
        problems = [one.replace("kronos-stream topics create", create_command) for one in problems]
    findings = [
        Finding("warn" if admin.CONFIG_HIDDEN in problem else "fail", *_split_remedy(problem))
        for problem in problems
    ]
    if not problems:
        found = f"{options.bootstrap_servers} answers; {len(topics)} topics are as they should be"
        findings.append(Finding("ok", found))
    findings += _warn_plaintext_password(options)
    missing = {problem.partition(":")[0] for problem in problems if ": missing" in problem}
    there = [topic.name for topic in topics if topic.name not in missing]
    return [*findings, *await _check_permissions(options, there, operation)] if there else findings


async def _check_permissions(
    options: KafkaOptions, names: Sequence[str], operation: Operation
) -> Sequence[Finding]:
    """Whether we may do that with these topics, by the brokers' word; nothing is sent."""
    does = "write to" if operation == "Write" else "read"
    client = AdminClient(_librdkafka_config(options), logger=_silent_logger)
    answers = client.describe_topics(
        TopicCollection(list(names)),
        include_authorized_operations=True,
        request_timeout=_REQUEST_TIMEOUT_SECONDS,
    )
    closed = []
    for name, answer in answers.items():
        try:
            topic = await asyncio.wrap_future(answer)
        except KafkaException as error:
            why = f"{name}: what we may do is not told: {error.args[0].str()}"
            return [Finding("warn", why, _acl_remedy(options, name, operation))]
        if not any(one.name == operation.upper() for one in topic.authorized_operations or ()):
            closed.append(name)
    if closed:
        return [
            Finding("fail", f"{name}: not ours to {does}", _acl_remedy(options, name, operation))
            for name in closed
        ]
    return [Finding("ok", f"{len(names)} topics are ours to {does}")]


def _warn_plaintext_password(options: KafkaOptions) -> Sequence[Finding]:
    hosts = [one.strip().rpartition(":")[0] for one in options.bootstrap_servers.split(",")]
    plain = (options.security_protocol, options.sasl_mechanism) == ("SASL_PLAINTEXT", "PLAIN")
    if not plain or not tls.any_remote(*hosts):
        return []
    cure = "use SASL_SSL, or SCRAM-SHA-512 where the broker speaks no TLS"
    return [Finding("warn", "the password is sent as it is, to be read on its way", cure)]


def _librdkafka_config(options: KafkaOptions) -> dict[str, Any]:
    """The same connection, in librdkafka's words."""
    given = {
        "bootstrap.servers": options.bootstrap_servers,
        "client.id": "kronos-stream",
        "security.protocol": options.security_protocol,
        "ssl.ca.location": options.ssl_cafile and str(options.ssl_cafile),
        "ssl.certificate.location": options.ssl_certfile and str(options.ssl_certfile),
        "ssl.key.location": str(options.ssl_keyfile or options.ssl_certfile or ""),
        "ssl.key.password": options.ssl_key_password.get_secret_value(),
    }
    if options.security_protocol.startswith("SASL"):
        given |= {
            "sasl.mechanism": options.sasl_mechanism,
            "sasl.username": options.sasl_username,
            "sasl.password": options.sasl_password.get_secret_value(),
        }
    return {name: value for name, value in given.items() if value}


def _split_remedy(problem: str) -> tuple[str, str]:
    """A problem as :func:`admin.check` tells it: what it is, and what to do."""
    found, _, cure = problem.partition("; ")
    return found, cure


def _connection_remedy(options: KafkaOptions) -> str:
    prefix = "KRONOS_STREAM_KAFKA__"
    return (
        f"see {prefix}BOOTSTRAP_SERVERS, whether a broker listens there, and whether it is "
        f"{options.security_protocol} ({prefix}SECURITY_PROTOCOL)"
    )


def _acl_remedy(options: KafkaOptions, name: str, operation: Operation) -> str:
    return (
        f"let an administrator allow it: kafka-acls.sh --add --allow-principal "
        f"User:{options.sasl_username or 'NAME'} --operation {operation} --operation Describe "
        f"--topic {name}"
    )
