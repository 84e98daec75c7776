"""Connections to Binance as a state machine: subscriptions and handovers."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from kronos_connectors.binance import pool as fleets
from kronos_connectors.binance.frames import IgnoredFrame, Kline, Response, ServerShutdown
from kronos_connectors.binance.pool import InvalidFrame
from tests.support.binance_venue import (
    LIFE,
    fake_venue,
    followed,
    kline,
    name,
)


def test_pool_connects_and_subscribes() -> None:
    v = fake_venue()
    v.run(60)
    assert v.open_times == [0.0]
    assert v.covered() == {name(n) for n in range(3)}
    assert v.update_counts == {"Response": 1, "Kline": 60}
    assert v.closed == []


def test_pool_without_streams_opens_no_connection() -> None:
    v = fake_venue(0)
    v.run(1_000)
    assert v.open_times == []


def test_frames_are_decoded() -> None:
    v = fake_venue(1)
    v.run(1)
    (connection,) = v.open_sockets

    def receive(frame: bytes) -> object:
        return v.pool.receive(connection, frame, 2.0)

    told = receive(kline(name(0)))
    assert isinstance(told, Kline)
    assert told.series.name == "binance:S0000/USDT:1m"
    assert receive(kline(name(7))) == IgnoredFrame()
    assert receive(b'{"result":null,"id":99}') == Response(99, "")
    garbage = receive(b"<html>")
    assert isinstance(garbage, InvalidFrame)
    assert garbage.series is None
    assert "not JSON" in garbage.reason
    assert receive(kline(name(0)).replace(b'"x":false', b'"x":0')) == InvalidFrame(
        told.series, "field x is not a boolean: 0"
    )
    assert receive(b'{"e":"serverShutdown"}') == ServerShutdown()


def test_streams_are_spread_evenly_and_subscribed_in_batches() -> None:
    v = fake_venue(2_500, room=1_024)
    v.run(30)
    assert sorted(len(socket.streams) for socket in v.open_sockets.values()) == [833, 833, 834]
    assert len(v.covered()) == 2_500
    for socket in v.open_sockets.values():
        assert len(socket.arrivals) == 6
        assert all(b - a >= 0.34 for a, b in pairwise(socket.arrivals))
    assert all(b - a >= fleets.OPEN_INTERVAL_SECONDS for a, b in pairwise(v.open_times))


def test_changed_streams_are_subscribed_by_their_difference() -> None:
    v = fake_venue(4, room=3)
    v.run(5)
    v.pool.follow(followed(1, 2, 3, 4, 5))
    v.run(5)
    assert v.covered() == {name(n) for n in (1, 2, 3, 4, 5)}
    assert (len(v.open_times), v.closed) == (2, [])
    assert sum(len(socket.streams) for socket in v.open_sockets.values()) == 5
    v.pool.follow(followed(5))
    v.run(5)
    assert v.covered() == {name(5)}
    assert [why for _, why in v.closed] == [""]
    v.pool.follow({})
    v.run(5)
    assert v.open_sockets == {}


def test_full_connection_unsubscribes_before_it_subscribes() -> None:
    v = fake_venue(1_024, room=1_024)
    v.run(10)
    v.pool.follow(followed(*range(500, 1_524)))
    v.run(10)
    assert v.covered() == {name(n) for n in range(500, 1_524)}
    assert len(v.open_times) == 1


def test_more_streams_open_another_connection() -> None:
    v = fake_venue(3, room=3)
    v.run(5)
    v.pool.follow(followed(*range(7)))
    v.run(5)
    assert sorted(len(socket.streams) for socket in v.open_sockets.values()) == [2, 2, 3]


def test_responding_server_of_quiet_markets_is_kept() -> None:
    v = fake_venue(1, interval="1h")
    v.pushes = False
    v.run(3_000)
    assert len(v.open_times) == 1
    (socket,) = v.open_sockets.values()
    assert Counter(socket.methods) == {"SUBSCRIBE": 1, "LIST_SUBSCRIPTIONS": 299}


def test_expiring_connection_is_replaced_without_a_gap() -> None:
    v = fake_venue(300, seed=3)
    v.run(0.9 * LIFE - 1)
    assert len(v.open_times) == 1
    for _ in range(5_000):
        v.run(0.1)
        assert len(v.covered()) == 300
    assert len(v.open_times) == 2
    (ended, why), began = v.closed[0], v.open_times[1]
    assert why == ""
    assert fleets.OVERLAP_SECONDS < ended - began < 5


def test_shutdown_announcement_replaces_connections_without_a_gap() -> None:
    v = fake_venue(10, room=5)
    v.run(10)
    v.after(0, v.shut_down)
    for _ in range(100):
        v.run(0.1)
        assert len(v.covered()) == 10
    assert (len(v.open_times), len(v.open_sockets), len(v.closed)) == (4, 2, 2)


def test_old_connection_stays_until_the_new_one_has_added_streams() -> None:
    v = fake_venue(3)
    v.run(10)
    v.after(0, v.shut_down)
    v.run(0.5)
    v.answers = False
    v.pool.follow(followed(*range(5)))
    v.run(3.5)
    assert len(v.open_sockets) == 2
    v.answers = True
    v.run(10)
    assert len(v.open_sockets) == 1
    assert len(v.covered()) == 5


def test_failed_handover_is_retried_while_the_old_connection_serves() -> None:
    v = fake_venue()
    v.run(10)
    v.accepts = lambda number: number > 4
    v.after(0, v.shut_down)
    for _ in range(200):
        v.run(0.1)
        assert len(v.covered()) == 3
    assert len(v.open_times) == 5
    assert len(v.open_sockets) == 1
