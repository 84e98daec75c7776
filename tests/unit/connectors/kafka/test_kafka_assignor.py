"""Assignment of partitions: even for each topic, with as few moves as possible."""

from __future__ import annotations

from random import Random

import pytest

from kronos_connectors.kafka.assignor import assign_partitions, create_sticky_assignor

TOPICS = {"1m": range(32), "1s": range(32), "1d": range(5)}


def _check(shares: dict[str, dict[str, list[int]]]) -> None:
    for topic, partitions in TOPICS.items():
        assigned = [one for share in shares.values() for one in share[topic]]
        assert sorted(assigned) == list(partitions), "each partition has exactly one member"
        sizes = {len(share[topic]) for share in shares.values()}
        assert max(sizes) - min(sizes) <= 1


def _moved_partitions(
    before: dict[str, dict[str, list[int]]], after: dict[str, dict[str, list[int]]]
) -> int:
    """Number of partitions with a new member."""
    return sum(
        len(set(partitions) - set(before.get(one, {}).get(topic, ())))
        for one, share in after.items()
        for topic, partitions in share.items()
    )


@pytest.mark.parametrize("seed", range(30))
def test_assignment_is_even_while_members_change(seed: int) -> None:
    random = Random(seed)
    shares: dict[str, dict[str, list[int]]] = {}
    for number in range(20):
        stay = {one: share for one, share in shares.items() if random.random() < 0.8}
        new = [f"new-{number}-{one}" for one in range(random.randrange(3))]
        members = stay | {one: {} for one in new} or {"only": {}}
        after = assign_partitions(TOPICS, members)
        _check(after)
        if members == shares:
            assert after == shares, "no member joined or left"
        shares = after


def test_only_necessary_partitions_move() -> None:
    two = assign_partitions(TOPICS, {"a": {}, "b": {}})
    assert [len(two["a"][topic]) for topic in ("1m", "1s")] == [16, 16]
    three = assign_partitions(TOPICS, two | {"c": {}})
    assert _moved_partitions(two, three) == sum(map(len, three["c"].values()))
    left = {one: share for one, share in three.items() if one != "a"}
    assert _moved_partitions(left, assign_partitions(TOPICS, left)) == sum(
        map(len, three["a"].values())
    )


def test_partitions_claimed_twice_get_one_member() -> None:
    _check(assign_partitions(TOPICS, {"a": {"1m": range(32)}, "b": {"1m": range(32), "gone": [1]}}))


def test_members_report_their_partitions_in_metadata() -> None:
    first_member, second_member = create_sticky_assignor(), create_sticky_assignor()
    members = {"a": first_member.metadata(["1m", "1s"]), "b": second_member.metadata(["1m", "1s"])}

    class Cluster:
        @staticmethod
        def partitions_for_topic(topic: str) -> set[int]:
            return set(TOPICS[topic])

    first = first_member.assign(Cluster(), members)
    first_member.on_assignment(first["b"])
    second_member.on_assignment(first["a"])
    members = {"a": first_member.metadata(["1m", "1s"]), "b": second_member.metadata(["1m", "1s"])}
    again = second_member.assign(Cluster(), members)
    assert again["a"].assignment == first["b"].assignment
    broken = {"a": members["a"], "b": type(members["a"])(0, ["1m", "1s"], b"\x00nonsense")}
    assert again["a"].assignment == first_member.assign(Cluster(), broken)["a"].assignment
