"""A member of a consumer group, as aiokafka has it: made, watched over, and ended for good."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterable

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener
from aiokafka.errors import KafkaError

from kronos_connectors.kafka.assignor import create_sticky_assignor
from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.topic_state import Partition, TopicState

_log = structlog.get_logger()

REQUEST_TIMEOUT_SECONDS = 10.0
"""A broker that takes longer to answer is taken for gone."""

_FETCH_TIMEOUT_SECONDS = 10.0
"""Brokers answer twice a second, with or without records."""
_JOIN_TIMEOUT_SECONDS = 60.0
"""Until the group gives us partitions: it waits for members that have gone."""
_SESSION_TIMEOUT_MS, _HEARTBEAT_MS = 6_000, 2_000
"""How soon a member that was killed is given up: its successor waits for that."""
_STICKY_HEARTBEAT_MS = 1_000
_REBALANCE_TIMEOUT_MS = 30_000
"""How long the group waits for a member to hand over."""
_MAX_POLL_INTERVAL_MS = 86_400_000
"""Reading pauses while forecasts cannot be delivered: no reason to leave."""
_CLOSE_TIMEOUT_SECONDS = 2.0
_CLIENT_ID = {"client_id": f"kronos-stream-{socket.gethostname()}-{os.getpid()}"}
"""By which those who list the group can tell its members apart."""


def create_consumer(options: KafkaOptions, group: str) -> AIOKafkaConsumer:
    """A consumer that is not started, and that follows nothing."""
    return AIOKafkaConsumer(
        **options.client_arguments() | _CLIENT_ID,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",  # where the records that come next are gone already
        isolation_level="read_committed",
        session_timeout_ms=_SESSION_TIMEOUT_MS,
        heartbeat_interval_ms=_HEARTBEAT_MS,
        request_timeout_ms=round(REQUEST_TIMEOUT_SECONDS * 1000),
    )


def create_sticky_consumer(options: KafkaOptions, group: str) -> AIOKafkaConsumer:
    """The same for members that hand work over to each other, and keep what they can."""
    return AIOKafkaConsumer(
        **options.client_arguments() | _CLIENT_ID,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        partition_assignment_strategy=(create_sticky_assignor(),),
        session_timeout_ms=_SESSION_TIMEOUT_MS,
        heartbeat_interval_ms=_STICKY_HEARTBEAT_MS,
        rebalance_timeout_ms=_REBALANCE_TIMEOUT_MS,
        # An answer of the group may take as long as it waits for a member.
        request_timeout_ms=_REBALANCE_TIMEOUT_MS + round(REQUEST_TIMEOUT_SECONDS * 1000),
        max_poll_interval_ms=_MAX_POLL_INTERVAL_MS,
    )


class RebalanceListener(ConsumerRebalanceListener):  # type: ignore[misc]
    """Tells the reading what the group gives and takes."""

    def __init__(self, topic_state: TopicState, consumer: AIOKafkaConsumer) -> None:
        self._topic_state, self._consumer = topic_state, consumer

    def on_partitions_revoked(self, revoked: Iterable[Partition]) -> None:
        self._topic_state.on_revoked(revoked)

    def on_partitions_assigned(self, assigned: Iterable[Partition]) -> None:
        counts = {
            topic: len(self._consumer.partitions_for_topic(topic) or ())
            for topic in self._topic_state.topics
        }
        self._topic_state.on_assigned(assigned, counts)


class LivenessCheck:
    """Notices that no broker answers any more: the consumer itself says nothing of it.

    Times are seconds.
    """

    def __init__(self, now: float) -> None:
        self._last_activity, self._last_poll = now, 0

    def check(self, consumer: AIOKafkaConsumer, now: float) -> None:
        """Raises KafkaError after a while without any answer to a fetch."""
        ours = consumer.assignment()
        last = max((consumer.last_poll_timestamp(place) or 0 for place in ours), default=0)
        if last != self._last_poll:
            self._last_activity, self._last_poll = now, last
        patience = _FETCH_TIMEOUT_SECONDS if ours else _JOIN_TIMEOUT_SECONDS
        if now - self._last_activity > patience:
            raise KafkaError(f"no answer from any broker in {patience:g} s")


async def close_consumer(consumer: AIOKafkaConsumer) -> None:
    """Leave the group, in bounded time, and leave nothing behind.

    aiokafka's own stop() waits for brokers that hang, and ends as if it were cancelled when it
    meets a request under way. So it is a task of its own, and what it left is ended by hand.
    """
    await _wait_or_cancel(asyncio.ensure_future(consumer.stop()), timeout=_CLOSE_TIMEOUT_SECONDS)
    # Without connections nothing has an answer to wait for.
    await _wait_or_cancel(
        asyncio.ensure_future(consumer._client.close()), timeout=_CLOSE_TIMEOUT_SECONDS
    )
    coordinator, fetcher = consumer._coordinator, consumer._fetcher  # noqa: SLF001
    left: list[asyncio.Future[None] | None] = []
    if coordinator is not None:
        left += [coordinator._coordination_task, coordinator._heartbeat_task]  # noqa: SLF001
        left += [coordinator._commit_refresh_task]  # noqa: SLF001
    if fetcher is not None:
        left += [fetcher._fetch_task, *fetcher._pending_tasks]  # noqa: SLF001
    await _wait_or_cancel(*(task for task in left if task is not None), timeout=0)


async def _wait_or_cancel(*tasks: asyncio.Future[None], timeout: float) -> None:
    """Wait for tasks that end, in seconds, and cancel those that do not."""
    if not tasks:
        return
    _, late = await asyncio.wait(tasks, timeout=timeout)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late, timeout=_CLOSE_TIMEOUT_SECONDS)
