"""How a group shares partitions out: evenly topic by topic, and with as few moves as that takes.

All bars of a timeframe close at once, so each member is to have its share of every topic; and a
partition that moves costs its contexts, so members keep what they can.
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
    """Whose is what: by member and topic.

    topics: their partitions. members: at least one, with what each has had.
    """
    shares: dict[str, dict[str, list[int]]] = {one: {} for one in members}
    total = dict.fromkeys(members, 0)
    for topic, partitions in sorted(topics.items()):
        left = set(partitions)
        least, over = divmod(len(left), len(members))
        kept: dict[str, list[int]] = {}
        for one in sorted(members):
            kept[one] = sorted(left & set(members[one].get(topic, ())))
            left -= set(kept[one])
        # One more than the least is for those who have it anyway, and then for who has least.
        order = sorted(members, key=lambda one: (-min(len(kept[one]), least + 1), total[one], one))
        for place, one in enumerate(order):
            quota = least + (place < over)
            left |= set(kept[one][quota:])
            kept[one] = kept[one][:quota]
        rest = sorted(left)
        for place, one in enumerate(order):
            lacks = least + (place < over) - len(kept[one])
            shares[one][topic] = sorted(kept[one] + rest[:lacks])
            rest = rest[lacks:]
            total[one] += len(shares[one][topic])
    return shares


def create_sticky_assignor() -> type[AbstractPartitionAssignor]:
    """For one consumer: aiokafka's assignors keep what they remember with their class."""

    class StickyAssignor(AbstractPartitionAssignor):  # type: ignore[misc]
        """Every member tells what it has; the group's leader shares out."""

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
    """What a member has had; nothing if that cannot be read."""
    try:
        owned = orjson.loads(user_data)
        return {str(topic): [int(one) for one in parts] for topic, parts in owned.items()}
    except (ValueError, TypeError, AttributeError):
        return {}
