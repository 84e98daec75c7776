"""Checks of the brokers by ``kronos-stream doctor``."""

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
_silent_logger.disabled = True  # its errors are raised, too

Operation = Literal["Read", "Write"]


def checks(options: KafkaOptions, topic_names: Collection[str]) -> Sequence[Check]:
    """Checks of the login, of the configuration of the named topics, and of write access."""
    topics = [topic for topic in required_topics(options) if topic.name in topic_names]
    run = partial(_check_topics, options, topics, "Write")
    return [Check("kafka", run, _CHECK_TIMEOUT_SECONDS)]


def candle_checks(
    options: KafkaOptions, timeframes: Sequence[Timeframe], operation: Operation
) -> Sequence[Check]:
    """Checks of the login, of the candle topics, and of write or read access to them."""
    others = {topic.name for topic in required_topics(options)}
    if operation == "Write":
        others.discard(deadletter_topic(options.topic_prefix))
    topics = [topic for topic in required_topics(options, timeframes) if topic.name not in others]
    run = partial(_check_topics, options, topics, operation)
    return [Check("kafka candles", run, _CHECK_TIMEOUT_SECONDS)]


async def _check_topics(
    options: KafkaOptions, topics: Sequence[TopicSpec], operation: Operation
) -> Sequence[Finding]:
    try:
        problems = await admin.check(options, topics)
    except admin.TopicsError as error:
        if isinstance(error.__cause__, IncompatibleBrokerVersion):
            return [Finding("warn", str(error), "use it for experiments only")]
        return [Finding("fail", error.reason, error.remedy or _connection_remedy(options))]
    findings = [
        Finding("warn" if admin.CONFIG_HIDDEN in problem else "fail", message, remedy)
        for problem in problems
        for message, _, remedy in (problem.partition("; "),)
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
    """Check the access to topics by the brokers' answers; no record is sent."""
    client = AdminClient(_librdkafka_config(options), logger=_silent_logger)
    answers = client.describe_topics(
        TopicCollection(list(names)),
        include_authorized_operations=True,
        request_timeout=_REQUEST_TIMEOUT_SECONDS,
    )
    denied = []
    for name, answer in answers.items():
        try:
            topic = await asyncio.wrap_future(answer)
        except KafkaException as error:
            message = f"{name}: access rights unknown: {error.args[0].str()}"
            return [Finding("warn", message, _acl_remedy(options, name, operation))]
        if not any(one.name == operation.upper() for one in topic.authorized_operations or ()):
            denied.append(name)
    action = "write to" if operation == "Write" else "read"
    if not denied:
        return [Finding("ok", f"right to {action} {len(names)} topics")]
    return [
        Finding("fail", f"{name}: no right to {action} it", _acl_remedy(options, name, operation))
        for name in denied
    ]


def _warn_plaintext_password(options: KafkaOptions) -> Sequence[Finding]:
    hosts = [one.strip().rpartition(":")[0] for one in options.bootstrap_servers.split(",")]
    plain = (options.security_protocol, options.sasl_mechanism) == ("SASL_PLAINTEXT", "PLAIN")
    remedy = "use SASL_SSL, or SCRAM-SHA-512 if the broker does not support TLS"
    return tls.warn_plaintext_password(hosts, remedy) if plain else []


def _librdkafka_config(options: KafkaOptions) -> dict[str, Any]:
    """The options in the terms of librdkafka."""
    config = {
        "bootstrap.servers": options.bootstrap_servers,
        "client.id": "kronos-stream",
        "security.protocol": options.security_protocol,
        "ssl.ca.location": options.ssl_cafile and str(options.ssl_cafile),
        "ssl.certificate.location": options.ssl_certfile and str(options.ssl_certfile),
        "ssl.key.location": str(options.ssl_keyfile or options.ssl_certfile or ""),
        "ssl.key.password": options.ssl_key_password.get_secret_value(),
    }
    if options.security_protocol.startswith("SASL"):
        config |= {
            "sasl.mechanism": options.sasl_mechanism,
            "sasl.username": options.sasl_username,
            "sasl.password": options.sasl_password.get_secret_value(),
        }
    return {name: value for name, value in config.items() if value}


def _connection_remedy(options: KafkaOptions) -> str:
    prefix = "KRONOS_STREAM_KAFKA__"
    return (
        f"check that a broker listens at {prefix}BOOTSTRAP_SERVERS, and that it expects "
        f"{options.security_protocol} ({prefix}SECURITY_PROTOCOL)"
    )


def _acl_remedy(options: KafkaOptions, name: str, operation: Operation) -> str:
    return (
        f"an administrator can grant it: kafka-acls.sh --add --allow-principal "
        f"User:{options.sasl_username or 'NAME'} --operation {operation} --operation Describe "
        f"--topic {name}"
    )
