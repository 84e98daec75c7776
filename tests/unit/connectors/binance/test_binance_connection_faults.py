"""Connections to Binance as a state machine: faults, backoff and limits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest

from kronos_connectors.binance import pool as fleets
from kronos_connectors.binance.connection import RESPONSE_TIMEOUT_SECONDS
from tests.support.binance_venue import (
    STALL,
    FakeSocket,
    FakeVenue,
    fake_venue,
    followed,
    kline,
    name,
)


def _cut(v: FakeVenue) -> None:
    for connection in list(v.open_sockets):
        v.cut(connection)


def _stall(v: FakeVenue) -> None:
    v.answers = v.pushes = False
    v.after(20, lambda: v.__dict__.update(answers=True, pushes=True))


def _refuse(v: FakeVenue) -> None:
    v.error = "Invalid request"
    v.pool.follow(followed(1, 2, 3))
    v.after(5, lambda: v.__dict__.update(error=""))
    v.after(6, lambda: v.pool.follow(followed(0, 1, 2)))


def _stop_answering(v: FakeVenue) -> None:
    v.answers = False
    v.pool.follow(followed(1, 2))
    v.after(20, lambda: v.__dict__.update(answers=True))
    v.after(21, lambda: v.pool.follow(followed(0, 1, 2)))


def _send_error(v: FakeVenue) -> None:
    for connection in v.open_sockets:
        v.deliver(connection, b'{"code":3,"msg":"Too many requests","id":null}')


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (_cut, None),
        (_stall, "no answer within 5 s"),
        (_refuse, "request refused: Invalid request"),
        (_stop_answering, "no answer within 5 s"),
        (_send_error, "request refused: Too many requests"),
    ],
)
def test_faulty_connection_is_replaced(fault: Callable[[FakeVenue], None], why: str | None) -> None:
    v = fake_venue()
    v.run(100)
    v.after(0, lambda: fault(v))
    v.run(100)
    assert len(v.open_times) >= 2
    assert v.covered() == {name(n) for n in range(3)}
    assert len(v.open_sockets) == 1
    if why is not None:
        assert v.closed[0][1] == why


def test_silent_server_is_probed_and_replaced() -> None:
    v = fake_venue()
    v.run(100)
    _stall(v)
    v.run(STALL + RESPONSE_TIMEOUT_SECONDS + 3)
    ((ended, why),) = v.closed
    assert ended == pytest.approx(100 + STALL + RESPONSE_TIMEOUT_SECONDS, abs=1.5)
    assert why == "no answer within 5 s"
    assert len(v.open_times) == 2


def test_server_without_pushes_is_replaced_ever_less_often() -> None:
    v = fake_venue(1)
    v.pushes = False
    v.run(80)
    assert len(v.open_times) == 1  # 60 s bars, and as long again as it may stall
    v.run(10)
    assert len(v.open_times) == 2
    v.run(3_510)
    assert 5 <= len(v.open_times) <= 7


def test_backoff_grows_with_failures_and_resets_when_healthy() -> None:
    v = fake_venue()
    v.accepts = lambda _: False
    v.run(300)
    gaps = [b - a for a, b in pairwise(v.open_times)]
    for tries, gap in enumerate(gaps):
        assert 0.5 <= (gap - 0.05) / min(0.5 * 2**tries, 30.0) <= 1.01
    assert len({round(gap, 3) for gap in gaps[7:]}) > 3  # jitter
    v.accepts = lambda _: True
    v.run(100)
    opened = len(v.open_times)
    _cut(v)
    v.run(0.6)
    assert len(v.open_times) == opened + 1


def test_short_lived_connections_are_reopened_with_backoff() -> None:
    v = fake_venue()
    for _ in range(600):
        v.run(1)
        _cut(v)
    assert len(v.open_times) < 40


def test_retry_after_delays_all_connections() -> None:
    v = fake_venue(10, room=2)
    v.accepts = lambda _: False
    v.retry_after = 100.0
    v.run(99)
    assert len(v.open_times) <= 1
    v.accepts = lambda _: True
    v.run(10)
    assert len(v.covered()) == 10


def test_connection_attempts_stay_within_the_venues_limit() -> None:
    v = fake_venue(100, room=1)

    def cut() -> None:
        _cut(v)
        v.after(0.7, cut)

    cut()
    v.run(1_500)
    for first, later in zip(v.open_times, v.open_times[fleets.MAX_ATTEMPTS :], strict=False):
        assert later - first > fleets.ATTEMPT_WINDOW_SECONDS - 0.001
    assert len(v.open_times) > 800  # and it makes use of them


def test_events_of_removed_connections_are_ignored() -> None:
    v = fake_venue()
    v.run(10)
    (old,) = v.open_sockets
    _cut(v)
    v.pool.on_lost(old, v.now)
    v.pool.on_opened(old, v.now)
    v.pool.receive(old, b'{"e":"serverShutdown"}', v.now)
    v.run(10)
    assert len(v.open_times) == 2
    assert len(v.open_sockets) == 1


def _fault(v: FakeVenue, random: Random) -> None:
    """Cause a random fault or change."""
    chance, some = random.random(), random.sample(range(60), random.randrange(40))
    change: Callable[..., None] = v.__dict__.update

    def cut() -> None:
        if v.open_sockets:
            v.cut(random.choice(list(v.open_sockets)))

    def garble() -> None:
        for connection in list(v.open_sockets):
            v.deliver(connection, random.choice((b"", b"[]", b"\xff", kline(name(0))[:-9])))

    random.choice(
        (
            cut,
            garble,
            v.shut_down,
            lambda: v.pool.follow(followed(*some)),
            lambda: change(accepts=lambda number: Random(f"{chance} {number}").random() < chance),
            lambda: change(retry_after=30.0 if chance < 0.3 else 0.0),
            lambda: change(answers=chance < 0.6),
            lambda: change(pushes=chance < 0.6),
            lambda: change(error="refused" if chance < 0.3 else ""),
        )
    )()


@pytest.mark.parametrize("seed", range(10))
def test_pool_recovers_from_random_faults(seed: int) -> None:
    _run_random_faults(seed)


@pytest.mark.soak
def test_pool_recovers_from_hundreds_of_random_faults() -> None:
    for seed in range(10, 310):
        _run_random_faults(seed)


def _run_random_faults(seed: int) -> None:
    random = Random(seed)
    v = fake_venue(20, room=random.choice((5, 20, 100)), seed=seed)
    sockets: set[FakeSocket] = set()
    while v.now < 1_500:
        v.run(random.expovariate(0.2))
        sockets |= set(v.open_sockets.values())
        _fault(v, random)
    v.accepts, v.answers, v.pushes, v.error = lambda _: True, True, True, ""
    v.pool.follow(followed(*range(20)))
    v.run(700)
    assert v.covered() == {name(n) for n in range(20)}
    assert sum(len(socket.streams) for socket in v.open_sockets.values()) == 20
    for socket in sockets | set(v.open_sockets.values()):
        for first, fifth in zip(socket.arrivals, socket.arrivals[4:], strict=False):
            assert fifth - first >= 1.0
    for first, later in zip(v.open_times, v.open_times[299:], strict=False):
        assert later - first >= 300
    opened = len(v.open_times)
    v.run(1_000)
    assert len(v.open_times) == opened
