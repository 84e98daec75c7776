"""Creation and checks of the topics: ``kronos-stream topics``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import (
    IncompatibleBrokerVersion,
    KafkaError,
    NoError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    for_code,
)

from kronos_connectors._shared.client_errors import capture_aiokafka_errors
from kronos_connectors.kafka.errors import explain
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topics import TopicSpec, create_remedy

CONFIG_HIDDEN = "no right to see its settings"
"""Not an error: the topic can be used without that right."""

_TIMEOUT_SECONDS = 30.0


class TopicsError(Exception):
    """The brokers did not answer, or refused a request."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason, self.remedy = reason, remedy


async def create(options: KafkaOptions, topics: Sequence[TopicSpec]) -> list[str]:
    """Create missing topics, and leave others unchanged; returns one line per topic."""
    async with _admin(options) as admin:
        cluster = await admin.describe_cluster()
        brokers = len(cluster["brokers"])
        if cluster["controller_id"] not in {broker["node_id"] for broker in cluster["brokers"]}:
            raise IncompatibleBrokerVersion("it has no controller")
        copies = options.replication or min(3, brokers)
        # Writes continue after the loss of one replica, but never with a single replica left.
        safety = {"min.insync.replicas": str(max(1, copies - 1))}
        answer = await admin.create_topics(
            [
                NewTopic(t.name, t.partitions, copies, topic_configs=t.configs | safety)
                for t in topics
            ]
        )
        lines = []
        for name, code, message in answer.topic_errors:
            error = for_code(code)
            if error is NoError:
                lines.append(f"{name}: created, {options.partitions} partitions, {copies} replicas")
            elif error is TopicAlreadyExistsError:
                lines.append(f"{name}: exists")
            else:
                raise TopicsError(f"{name}: {message or error.description}")
        # Brokers answer before all of them know the new topics.
        while {topic.name for topic in topics} - set(await admin.list_topics()):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return lines


async def check(options: KafkaOptions, topics: Sequence[TopicSpec]) -> list[str]:
    """Problems of the topics, each a line with its remedy."""
    async with _admin(options) as admin:
        # All topics: a broker may create a topic that is requested by name.
        described = {topic["topic"]: topic["partitions"] for topic in await admin.describe_topics()}
        there = [topic for topic in topics if topic.name in described]
        configs = await _configs(admin, [topic.name for topic in there])
    alter = f"kafka-configs.sh --bootstrap-server {options.bootstrap_servers} --alter --topic"
    problems = []
    for topic in topics:
        if topic.name not in described:
            remedy = create_remedy([topic.name])
            problems.append(f"{topic.name}: missing, or no right to see it; {remedy}")
            continue
        partitions = described[topic.name]
        if len(partitions) != topic.partitions:
            problems.append(
                f"{topic.name}: {len(partitions)} partitions, not {topic.partitions}; set "
                f"KRONOS_STREAM_KAFKA__PARTITIONS={len(partitions)}, or delete the topic and "
                "create it again, because keys change their partition"
            )
        if (has := configs.get(topic.name)) is None:
            problems.append(
                f"{topic.name}: {CONFIG_HIDDEN}; to grant it: kafka-acls.sh --add "
                f"--allow-principal User:{options.sasl_username or 'NAME'} "
                f"--operation DescribeConfigs --topic {topic.name}"
            )
            continue
        settings = dict(_config_mismatches(topic.configs, has))
        copies = min(len(partition["replicas"]) for partition in partitions)
        if int(has["min.insync.replicas"]) > copies:  # nothing could be written
            settings["min.insync.replicas"] = str(max(1, copies - 1))
        problems += [
            f"{topic.name}: {name} is {has.get(name)}, not {value}; to change it: "
            f"{alter} {topic.name} --add-config {name}={value}"
            for name, value in settings.items()
        ]
    return problems


def _config_mismatches(
    wanted: Mapping[str, str], actual: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Wrong settings of a topic and their right values."""
    policy = wanted["cleanup.policy"]
    if actual["cleanup.policy"] != policy:
        yield "cleanup.policy", policy
    retention = wanted.get("retention.ms")
    if retention is not None and _retention_ms(actual["retention.ms"]) < _retention_ms(retention):
        yield "retention.ms", retention


def _retention_ms(milliseconds: str) -> float:
    return float("inf") if milliseconds == "-1" else float(milliseconds)


async def _configs(admin: AIOKafkaAdminClient, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Settings by topic, without the topics whose settings we have no right to see."""
    if not names:
        return {}
    answers = await admin.describe_configs(
        [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
    )
    configs = {}
    for answer in answers:
        for code, message, _, name, entries in answer.resources:
            if for_code(code) is TopicAuthorizationFailedError:
                continue
            if for_code(code) is not NoError:
                raise TopicsError(f"{name}: {message or for_code(code).description}")
            configs[name] = {key: value for key, value, *_ in entries}
    return configs


@asynccontextmanager
async def _admin(options: KafkaOptions) -> AsyncIterator[AIOKafkaAdminClient]:
    captured = capture_aiokafka_errors()
    captured.clear()
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            admin = AIOKafkaAdminClient(**options.client_arguments())
            try:
                await admin.start()
                yield admin
            finally:
                await admin.close()
    except IncompatibleBrokerVersion as error:
        raise TopicsError(
            f"{options.bootstrap_servers}: this broker does not support creating and describing "
            f"topics ({error.args[0]}); an embedded broker has all topics from the start"
        ) from error
    except (KafkaError, OSError) as error:
        found = explain(
            error, captured, options, timeout_message=f"no answer in {_TIMEOUT_SECONDS:g} s"
        )
        where = "" if captured.errors else f"{options.bootstrap_servers}: "
        raise TopicsError(f"{where}{found.message}", found.remedy) from error
