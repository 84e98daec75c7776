"""Clients of ccxt as a state machine, without ccxt and without a clock."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from kronos_connectors._shared.rotating_pool import NEVER, Close, Open
from kronos_connectors.ccxt.client import Client, Unwatch, Watch
from kronos_connectors.ccxt.pool import OVERLAP_SECONDS, ClientPool
from kronos_stream.market.series import Series

STALL, LIFE, ROOM = 30.0, 3_600.0, 4


def several(*numbers: int, timeframe: str = "1m") -> set[Series]:
    return {Series.parse(f"kraken:S{number:03}/USD:{timeframe}") for number in numbers}


class FakeClients:
    """Clients that a pool opens; a working one pushes each watched series every second."""

    def __init__(self, seed: int = 0) -> None:
        self.shards = ClientPool(
            Random(seed), capacity=ROOM, stall_seconds=STALL, lifetime_seconds=LIFE
        )
        self.now = 0.0
        self.watched: dict[Client, set[Series]] = {}
        self.unresponsive: set[Client] = set()
        self.pinging: set[Client] = set()
        self.all_silent = False
        self.silent_series: set[Series] = set()
        self.closed: list[str] = []
        self.created = 0

    def act(self) -> None:
        for command in self.shards.poll(self.now):
            client = command.member
            if isinstance(command, Open):
                assert client not in self.watched
                self.watched[client] = set()
                self.created += 1
            elif isinstance(command, Watch):
                assert command.series not in self.watched[client]
                self.watched[client].add(command.series)
            elif isinstance(command, Unwatch):
                self.watched[client].remove(command.series)
            elif isinstance(command, Close):
                del self.watched[client]
                self.closed.append(command.reason)

    def fail(self, client: Client, retry_after: float = 0.0) -> None:
        self.shards.on_lost(client, self.now, retry_after)
        del self.watched[client]

    def run(self, seconds: float, events: Callable[[], None] = lambda: None) -> None:
        until = self.now + seconds
        while self.now < until:
            events()
            self.act()
            for client, series in self.watched.items():
                if client in self.unresponsive:
                    continue
                self.shards.on_activity(client, self.now)
                if client not in self.pinging and not self.all_silent:
                    for one in series - self.silent_series:
                        self.shards.on_candle(client, one, self.now)
            self.now += 1.0

    def counts(self) -> dict[Series, int]:
        """By how many clients each series is watched."""
        all_of_them = [one for series in self.watched.values() for one in series]
        return {one: all_of_them.count(one) for one in all_of_them}


def test_series_are_spread_over_as_few_clients_as_possible() -> None:
    world = FakeClients()
    world.shards.follow(several(*range(10)))
    world.run(20)
    assert sorted(map(len, world.watched.values())) == [3, 3, 4]
    assert world.counts() == dict.fromkeys(several(*range(10)), 1)


def test_client_watches_one_timeframe_only() -> None:
    world = FakeClients()
    world.shards.follow(several(1, 2) | several(1, 2, timeframe="5m"))
    world.run(20)
    world.shards.follow(several(1, 2, 3) | several(3, timeframe="1h"))
    world.run(20)
    assert sorted(map(sorted, world.watched.values())) == [
        sorted(several(1, 2, 3)),
        sorted(several(3, timeframe="1h")),
    ]


def test_expired_client_stays_until_its_successor_has_candles() -> None:
    world = FakeClients()
    world.shards.follow(several(1, 2))
    lowest: list[int] = []
    world.run(10)
    world.run(3 * LIFE, lambda: lowest.append(min(world.counts().values())))
    assert 3 <= world.created <= 5
    assert min(lowest) == 1
    assert set(world.closed) == {""}
    assert len(world.watched) <= 2


def test_silent_client_is_replaced() -> None:
    world = FakeClients()
    world.shards.follow(several(1))
    world.run(50)
    world.unresponsive = set(world.watched)
    world.run(STALL + 5)
    assert world.closed == [f"silent for {STALL:g} s"]
    assert not world.unresponsive & world.watched.keys()
    assert world.counts() == dict.fromkeys(several(1), 1)


def test_clients_of_quiet_markets_are_replaced_ever_less_often() -> None:
    world = FakeClients()
    world.shards.follow(several(1))
    world.all_silent = True
    world.run(6 * 3_600)
    assert 4 <= world.created <= 9
    assert all(why.startswith("no candle for") for why in world.closed)


def test_backoff_grows_with_failures_and_resets_when_healthy() -> None:
    world = FakeClients()
    world.shards.follow(several(1))
    begun: list[float] = []

    def break_it() -> None:
        for client in list(world.watched):
            begun.append(world.now)
            world.fail(client)

    world.run(600, break_it)
    assert 15 < len(begun) < 60
    assert begun[-1] - begun[-2] > 10
    world.run(120)
    world.fail(next(iter(world.watched)))
    world.run(3)
    assert world.counts() == dict.fromkeys(several(1), 1)


def test_retry_after_delays_all_clients() -> None:
    world = FakeClients()
    world.shards.follow(several(*range(8)))
    world.run(10)
    for client in list(world.watched):
        world.fail(client, retry_after=120.0)
    world.run(118)
    assert world.created == 2
    world.run(10)
    assert world.created == 4


def test_refused_series_is_retried_without_affecting_others() -> None:
    world = FakeClients()
    bad, good = sorted(several(1, 2))
    world.shards.follow([bad, good])
    world.silent_series = {bad}
    tried = 0

    def refuse() -> None:
        nonlocal tried
        for client, series in world.watched.items():
            if bad in series:
                tried += 1
                series.remove(bad)
                world.shards.on_refused(client, bad, world.now)

    world.run(1_800, refuse)
    assert 3 <= tried <= 8
    assert world.created == 1
    assert world.counts()[good] == 1


def test_changed_series_leave_the_others_on_their_client() -> None:
    world = FakeClients()
    world.shards.follow(several(1, 2, 3))
    world.run(10)
    (client,) = world.watched
    world.shards.follow(several(2, 3, 4))
    world.run(10)
    assert world.watched == {client: several(2, 3, 4)}
    world.shards.follow([])
    world.run(2)
    assert world.watched == {}
    assert world.shards.next_wakeup == NEVER


def test_client_with_many_unneeded_series_is_replaced() -> None:
    world = FakeClients()
    for first in range(6):
        world.shards.follow(several(first, 100))
        world.run(5)
    world.run(2 * STALL + OVERLAP_SECONDS)
    assert world.created == 2
    assert world.counts() == dict.fromkeys(several(5, 100), 1)
    assert set(world.closed) == {""}


@pytest.mark.parametrize("seed", range(60))
def test_pool_recovers_from_random_faults(seed: int) -> None:
    random, world = Random(seed), FakeClients(seed)
    wanted = several(*range(random.randrange(1, 14)))
    world.shards.follow(wanted)

    def trouble() -> None:
        nonlocal wanted
        clients = list(world.watched)
        if clients and random.random() < 0.05:
            world.fail(random.choice(clients), random.choice((0.0, 0.0, 5.0)))
        elif clients and random.random() < 0.02:
            world.unresponsive.add(random.choice(clients))
        elif clients and random.random() < 0.02:
            world.pinging.add(random.choice(clients))
        elif random.random() < 0.05:
            wanted = several(*random.sample(range(20), random.randrange(15)))
            world.shards.follow(wanted)
        assert all(count <= 2 for count in world.counts().values())

    world.run(1_000, trouble)
    world.unresponsive, world.pinging = set(), set()
    world.run(STALL + 30 + 64 + OVERLAP_SECONDS)
    assert world.counts() == dict.fromkeys(wanted, 1)
    assert len(world.watched) <= -(-20 // ROOM) + 1
