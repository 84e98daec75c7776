"""Sticky assignment of partitions: even for each topic, with as few moves as possible.

All bars of a timeframe close at once, so each member needs its share of every topic. A partition
that moves loses its contexts, so members keep what they can.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import orjson
from aiokafka.cluster import ClusterMetadata
from aiokafka.coordinator.assignors.abstract import AbstractPartitionAssignor
from aiokafka.coordinator.protocol import (
    ConsumerProtocolMemberAssignment,
    ConsumerProtocolMemberMetadata,
)

OwnedPartitions = Mapping[str, Iterable[int]]
"""Partitions by topic."""


def assign_partitions(
    topics: Mapping[str, Iterable[int]], members: Mapping[str, OwnedPartitions]
) -> dict[str, dict[str, list[int]]]:
    """Partitions by member and topic.

    topics: all partitions. members: at least one, with the partitions that each has had.
    """
    shares: dict[str, dict[str, list[int]]] = {member: {} for member in members}
    total = dict.fromkeys(members, 0)
    for topic, partitions in sorted(topics.items()):
        free = set(partitions)
        minimum, extra = divmod(len(free), len(members))
        kept: dict[str, list[int]] = {}
        for member in sorted(members):
            kept[member] = sorted(free & set(members[member].get(topic, ())))
            free -= set(kept[member])
        # One above the minimum goes to members that have it already, then to the least loaded.
        order = sorted(
            members, key=lambda one: (-min(len(kept[one]), minimum + 1), total[one], one)
        )
        for place, member in enumerate(order):
            quota = minimum + (place < extra)
            free |= set(kept[member][quota:])
            kept[member] = kept[member][:quota]
        rest = sorted(free)
        for place, member in enumerate(order):
            lacking = minimum + (place < extra) - len(kept[member])
            shares[member][topic] = sorted(kept[member] + rest[:lacking])
            rest = rest[lacking:]
            total[member] += len(shares[member][topic])
    return shares


def create_sticky_assignor() -> type[AbstractPartitionAssignor]:
    """A new class for one consumer: aiokafka's assignors keep their state in the class."""

    class StickyAssignor(AbstractPartitionAssignor):  # type: ignore[misc]
        """Members report their partitions; the leader of the group assigns them."""

        name = "kronos"
        _owned: dict[str, list[int]] = {}  # noqa: RUF012 - replaced, never changed

        @classmethod
        def assign(
            cls, cluster: ClusterMetadata, members: Mapping[str, ConsumerProtocolMemberMetadata]
        ) -> dict[str, ConsumerProtocolMemberAssignment]:
            wanted = {topic for one in members.values() for topic in one.subscription}
            topics = {topic: cluster.partitions_for_topic(topic) or () for topic in wanted}
            had = {one: _decode_owned(metadata.user_data) for one, metadata in members.items()}
            return {
                one: ConsumerProtocolMemberAssignment(0, sorted(share.items()), b"")
                for one, share in assign_partitions(topics, had).items()
            }

        @classmethod
        def metadata(cls, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
            return ConsumerProtocolMemberMetadata(0, sorted(topics), orjson.dumps(cls._owned))

        @classmethod
        def on_assignment(cls, assignment: ConsumerProtocolMemberAssignment) -> None:
            cls._owned = {topic: list(partitions) for topic, partitions in assignment.assignment}

    return StickyAssignor


def _decode_owned(user_data: bytes) -> dict[str, list[int]]:
    """Partitions that a member has had; none if the data are invalid."""
    try:
        owned = orjson.loads(user_data)
        return {str(topic): [int(one) for one in parts] for topic, parts in owned.items()}
    except (ValueError, TypeError, AttributeError):
        return {}
