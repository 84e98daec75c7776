"""Create the topics and check them: ``kronos-stream topics``."""

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
from kronos_connectors.kafka.topics import TopicSpec, timeframe_of

CONFIG_HIDDEN = "its settings are hidden from us"
"""Of a topic that we may use all the same."""

_TIMEOUT_SECONDS = 30.0


class TopicsError(Exception):
    """The brokers did not answer, or refused; one line for people.

    cure: what to do about it.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason, self.remedy = reason, remedy


async def create(options: KafkaOptions, topics: Sequence[TopicSpec]) -> list[str]:
    """Create what is missing; one line per topic. What exists is left as it is."""
    async with _admin(options) as admin:
        cluster = await admin.describe_cluster()
        brokers = len(cluster["brokers"])
        if cluster["controller_id"] not in {broker["node_id"] for broker in cluster["brokers"]}:
            raise IncompatibleBrokerVersion("it has no controller")
        copies = options.replication or min(3, brokers)
        # One copy may be lost and writing goes on; never with one copy left of several.
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
        # Every broker is told, but not before we are answered.
        while {topic.name for topic in topics} - set(await admin.list_topics()):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return lines


async def check(options: KafkaOptions, topics: Sequence[TopicSpec]) -> list[str]:
    """What is wrong with the topics, and the cure: one line each."""
    async with _admin(options) as admin:
        # All topics, since a broker may create what it is asked about by name.
        described = {topic["topic"]: topic["partitions"] for topic in await admin.describe_topics()}
        there = [topic for topic in topics if topic.name in described]
        configs = await _configs(admin, [topic.name for topic in there])
    alter = f"kafka-configs.sh --bootstrap-server {options.bootstrap_servers} --alter --topic"
    problems = []
    for topic in topics:
        if topic.name not in described:
            timeframe = timeframe_of(topic.name)
            problems.append(
                f"{topic.name}: missing, or not ours to see; to create it: "
                f"kronos-stream topics create{f' --candles {timeframe}' if timeframe else ''}"
            )
            continue
        partitions = described[topic.name]
        if len(partitions) != topic.partitions:
            problems.append(
                f"{topic.name}: {len(partitions)} partitions, not {topic.partitions}; keys would "
                f"move: set KRONOS_STREAM_KAFKA__PARTITIONS={len(partitions)}, or delete the topic "
                "and create it anew"
            )
        if (has := configs.get(topic.name)) is None:
            problems.append(
                f"{topic.name}: {CONFIG_HIDDEN}; to have them checked: kafka-acls.sh --add "
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
    """The configs that matter to readers and are not as they should be."""
    policy = wanted["cleanup.policy"]
    if actual["cleanup.policy"] != policy:
        yield "cleanup.policy", policy
    retention = wanted.get("retention.ms")
    if retention is not None and _retention_ms(actual["retention.ms"]) < _retention_ms(retention):
        yield "retention.ms", retention


def _retention_ms(milliseconds: str) -> float:
    return float("inf") if milliseconds == "-1" else float(milliseconds)


async def _configs(admin: AIOKafkaAdminClient, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """By topic; those are left out that we have no right to see."""
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
    chatter = capture_aiokafka_errors()
    chatter.clear()
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
            f"{options.bootstrap_servers}: this broker does not know the requests that create and "
            f"describe topics ({error.args[0]}); an embedded one has its topics from the start"
        ) from error
    except (KafkaError, OSError) as error:
        found = explain(
            error, chatter, options, timeout_message=f"no answer in {_TIMEOUT_SECONDS:g} s"
        )
        where = "" if chatter.errors else f"{options.bootstrap_servers}: "
        raise TopicsError(f"{where}{found.message}", found.remedy) from error
