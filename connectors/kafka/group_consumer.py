"""Consumers of a group: creation, liveness check, and an end that leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from aiokafka.structs import OffsetAndMetadata

from kronos_connectors.kafka.assignor import create_sticky_assignor
from kronos_connectors.kafka.options import KafkaOptions

REQUEST_TIMEOUT_SECONDS = 10.0
"""A broker that takes longer to answer is considered down."""

_FETCH_TIMEOUT_SECONDS = 10.0
"""Brokers answer fetches twice a second, with or without records."""
_SESSION_TIMEOUT_MS, _HEARTBEAT_MS = 6_000, 2_000
"""Time until the group drops a killed member; its successor waits for that."""
_STICKY_HEARTBEAT_MS = 1_000
_REBALANCE_TIMEOUT_MS = 30_000
"""Time that the group waits for a member to release its partitions."""
_MAX_POLL_INTERVAL_MS = 86_400_000
"""Reading pauses while forecasts cannot be delivered, which is no reason to leave the group."""
_CLOSE_TIMEOUT_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """Options of a membership; times are seconds."""

    name: str
    context_bars: int
    """Age of the oldest records that are read back, in bars."""
    commit_interval: float
    commit_timeout: float
    sticky: bool = False
    """Members keep as many partitions as they can in a rebalance, and release the others."""
    check_topics: bool = False
    """Read nothing while a topic is missing."""


def create_consumer(options: KafkaOptions, group: GroupOptions) -> AIOKafkaConsumer:
    """A consumer, not started, without a subscription."""
    heartbeat_ms, request_timeout_ms = _HEARTBEAT_MS, round(REQUEST_TIMEOUT_SECONDS * 1000)
    more: dict[str, Any] = {}
    if group.sticky:
        heartbeat_ms = _STICKY_HEARTBEAT_MS
        # The group may answer only after its slowest member has released its partitions.
        request_timeout_ms += _REBALANCE_TIMEOUT_MS
        more = {
            "partition_assignment_strategy": (create_sticky_assignor(),),
            "rebalance_timeout_ms": _REBALANCE_TIMEOUT_MS,
            "max_poll_interval_ms": _MAX_POLL_INTERVAL_MS,
        }
    # The client id distinguishes the members in lists of the group.
    client_id = f"kronos-stream-{socket.gethostname()}-{os.getpid()}"
    return AIOKafkaConsumer(
        **options.client_arguments() | {"client_id": client_id} | more,
        group_id=group.name,
        enable_auto_commit=False,
        auto_offset_reset="earliest",  # if the next records are deleted already
        isolation_level="read_committed",
        session_timeout_ms=_SESSION_TIMEOUT_MS,
        heartbeat_interval_ms=heartbeat_ms,
        request_timeout_ms=request_timeout_ms,
    )


class LivenessCheck:
    """Detects that no broker answers fetches any more, which a consumer does not report."""

    def __init__(self, now: float) -> None:
        """now: seconds of any steady clock."""
        self._last_activity, self._last_poll = now, 0

    def check(self, consumer: AIOKafkaConsumer, now: float) -> None:
        """Raise KafkaError once a fetch is overdue."""
        polls = (consumer.last_poll_timestamp(place) or 0 for place in consumer.assignment())
        if (last := max(polls, default=0)) != self._last_poll:
            self._last_activity, self._last_poll = now, last
        if now - self._last_activity > _FETCH_TIMEOUT_SECONDS:
            raise KafkaError(f"no answer from any broker in {_FETCH_TIMEOUT_SECONDS:g} s")


async def fetch_committed(
    kafka: KafkaOptions, group: str, places: Sequence[TopicPartition]
) -> Mapping[TopicPartition, OffsetAndMetadata]:
    """Committed offsets with metadata, which a consumer does not return. Raises KafkaError."""
    admin = AIOKafkaAdminClient(**kafka.client_arguments())
    try:
        await admin.start()
        committed = await admin.list_consumer_group_offsets(group, partitions=list(places))
    finally:
        with suppress(KafkaError, OSError):
            async with asyncio.timeout(_CLOSE_TIMEOUT_SECONDS):
                await admin.close()
    # aiokafka reports no error if the broker is not, or not yet, the coordinator of the group.
    if set(places) - committed.keys():
        raise KafkaError(f"committed offsets of group {group} are not available yet")
    return dict(committed)


async def close_consumer(consumer: AIOKafkaConsumer) -> None:
    """Leave the group in bounded time, and end all tasks of the consumer.

    aiokafka's own stop() waits for brokers that hang, and raises CancelledError when a request is
    pending. So it runs in a task of its own, and what it leaves behind is ended here.
    """
    await _wait_or_cancel(asyncio.ensure_future(consumer.stop()), seconds=_CLOSE_TIMEOUT_SECONDS)
    # Without connections, no task has an answer to wait for.
    closing = asyncio.ensure_future(consumer._client.close())  # noqa: SLF001
    await _wait_or_cancel(closing, seconds=_CLOSE_TIMEOUT_SECONDS)
    coordinator, fetcher = consumer._coordinator, consumer._fetcher  # noqa: SLF001
    left: list[asyncio.Future[None] | None] = []
    if coordinator is not None:
        left += [coordinator._coordination_task, coordinator._heartbeat_task]  # noqa: SLF001
        left += [coordinator._commit_refresh_task]  # noqa: SLF001
    if fetcher is not None:
        left += [fetcher._fetch_task, *fetcher._pending_tasks]  # noqa: SLF001
    await _wait_or_cancel(*(task for task in left if task is not None), seconds=0)


async def _wait_or_cancel(*tasks: asyncio.Future[None], seconds: float) -> None:
    """Wait for tasks, and cancel those that do not end within ``seconds``."""
    if not tasks:
        return
    _, late = await asyncio.wait(tasks, timeout=seconds)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late, timeout=_CLOSE_TIMEOUT_SECONDS)
