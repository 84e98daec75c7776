"""A member of a consumer group, as aiokafka has it: made, watched over, and ended for good."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterable

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener
from aiokafka.errors import KafkaError

from kronos_connectors.kafka.options import KafkaOptions
from kronos_connectors.kafka.reading import Place, Reading
from kronos_connectors.kafka.sharing import assignor

_log = structlog.get_logger()

ANSWER_SECONDS = 10.0
"""A broker that takes longer to answer is taken for gone."""

_SILENCE_SECONDS = 10.0
"""Brokers answer twice a second, with or without records."""
_JOIN_SECONDS = 60.0
"""Until the group gives us partitions: it waits for members that have gone."""
_SESSION_MS, _HEARTBEAT_MS = 6_000, 2_000
"""How soon a member that was killed is given up: its successor waits for that."""
_SHARING_HEARTBEAT_MS = 1_000
_REBALANCE_MS = 30_000
"""How long the group waits for a member to hand over."""
_LONGEST_IDLE_MS = 86_400_000
"""Reading pauses while forecasts cannot be delivered: no reason to leave."""
_CLOSE_SECONDS = 2.0
_NAME = {"client_id": f"kronos-stream-{socket.gethostname()}-{os.getpid()}"}
"""By which those who list the group can tell its members apart."""


def make(options: KafkaOptions, group: str) -> AIOKafkaConsumer:
    """A consumer that is not started, and that follows nothing."""
    return AIOKafkaConsumer(
        **options.connection() | _NAME,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",  # where the records that come next are gone already
        isolation_level="read_committed",
        session_timeout_ms=_SESSION_MS,
        heartbeat_interval_ms=_HEARTBEAT_MS,
        request_timeout_ms=round(ANSWER_SECONDS * 1000),
    )


def make_sharing(options: KafkaOptions, group: str) -> AIOKafkaConsumer:
    """The same for members that hand work over to each other, and keep what they can."""
    return AIOKafkaConsumer(
        **options.connection() | _NAME,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        partition_assignment_strategy=(assignor(),),
        session_timeout_ms=_SESSION_MS,
        heartbeat_interval_ms=_SHARING_HEARTBEAT_MS,
        rebalance_timeout_ms=_REBALANCE_MS,
        # An answer of the group may take as long as it waits for a member.
        request_timeout_ms=_REBALANCE_MS + round(ANSWER_SECONDS * 1000),
        max_poll_interval_ms=_LONGEST_IDLE_MS,
    )


class Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """Tells the reading what the group gives and takes."""

    def __init__(self, reading: Reading, consumer: AIOKafkaConsumer) -> None:
        self._reading, self._consumer = reading, consumer

    def on_partitions_revoked(self, revoked: Iterable[Place]) -> None:
        self._reading.revoked(revoked)

    def on_partitions_assigned(self, assigned: Iterable[Place]) -> None:
        counts = {
            topic: len(self._consumer.partitions_for_topic(topic) or ())
            for topic in self._reading.topics
        }
        self._reading.assigned(assigned, counts)


class Pulse:
    """Notices that no broker answers any more: the consumer itself says nothing of it.

    Times are seconds.
    """

    def __init__(self, now: float) -> None:
        self._heard, self._last = now, 0

    def check(self, consumer: AIOKafkaConsumer, now: float) -> None:
        """Raises KafkaError after a while without any answer to a fetch."""
        ours = consumer.assignment()
        last = max((consumer.last_poll_timestamp(place) or 0 for place in ours), default=0)
        if last != self._last:
            self._heard, self._last = now, last
        patience = _SILENCE_SECONDS if ours else _JOIN_SECONDS
        if now - self._heard > patience:
            raise KafkaError(f"no answer from any broker in {patience:g} s")


async def end(consumer: AIOKafkaConsumer) -> None:
    """Leave the group, in bounded time, and leave nothing behind.

    aiokafka's own stop() waits for brokers that hang, and ends as if it were cancelled when it
    meets a request under way. So it is a task of its own, and what it left is ended by hand.
    """
    await _ended(asyncio.ensure_future(consumer.stop()), patience=_CLOSE_SECONDS)
    # Without connections nothing has an answer to wait for.
    await _ended(asyncio.ensure_future(consumer._client.close()), patience=_CLOSE_SECONDS)  # noqa: SLF001
    coordinator, fetcher = consumer._coordinator, consumer._fetcher  # noqa: SLF001
    left: list[asyncio.Future[None] | None] = []
    if coordinator is not None:
        left += [coordinator._coordination_task, coordinator._heartbeat_task]  # noqa: SLF001
        left += [coordinator._commit_refresh_task]  # noqa: SLF001
    if fetcher is not None:
        left += [fetcher._fetch_task, *fetcher._pending_tasks]  # noqa: SLF001
    await _ended(*(task for task in left if task is not None), patience=0)


async def _ended(*tasks: asyncio.Future[None], patience: float) -> None:
    """Wait for tasks that end, in seconds, and cancel those that do not."""
    if not tasks:
        return
    _, late = await asyncio.wait(tasks, timeout=patience)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late, timeout=_CLOSE_SECONDS)
