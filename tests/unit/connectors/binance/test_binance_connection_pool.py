"""The connections to Binance as machines: no socket, no clock; the venue is played in memory."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from itertools import count, pairwise
from random import Random

import orjson
import pytest

from kronos_connectors._shared.rotating_pool import NEVER, Open
from kronos_connectors.binance import pool as fleets
from kronos_connectors.binance.connection import RESPONSE_TIMEOUT_SECONDS, Connection, Send
from kronos_connectors.binance.frames import IgnoredFrame, Kline, Response, ServerShutdown
from kronos_connectors.binance.pool import Command, ConnectionPool, InvalidFrame
from kronos_stream.market.series import Series

OPEN_MS = 1_750_000_020_000
STALL, LIFE = 10.0, 3_600.0


def followed(*numbers: int, interval: str = "1m") -> dict[tuple[str, str], Series]:
    return {
        (f"S{n:04}USDT", interval): Series.parse(f"binance:S{n:04}/USDT:{interval}")
        for n in numbers
    }


def name(number: int, interval: str = "1m") -> str:
    return f"s{number:04}usdt@kline_{interval}"


def kline(stream: str) -> bytes:
    symbol, _, interval = stream.partition("@kline_")
    numbers = {"o": "1", "h": "2", "l": "1", "c": "2", "v": "3", "q": "4"}
    bar = {"t": OPEN_MS, "T": OPEN_MS + 59_999, "s": symbol.upper(), "i": interval, "x": False}
    event = {"e": "kline", "E": OPEN_MS + 5, "s": symbol.upper(), "k": bar | numbers}
    return orjson.dumps({"stream": stream, "data": event})


class FakeSocket:
    """What the venue knows of one."""

    def __init__(self) -> None:
        self.streams: set[str] = set()
        self.arrivals: list[float] = []
        self.methods: list[str] = []


class FakeVenue:
    """The other side of a fleet; time leaps to whatever is due next."""

    def __init__(self, fleet: ConnectionPool) -> None:
        self.fleet, self.now = fleet, 0.0
        self.open_times: list[float] = []
        self.open_sockets: dict[Connection, FakeSocket] = {}
        self.closed: list[tuple[float, str]] = []
        self.update_counts: Counter[str] = Counter()
        self.accepts: Callable[[int], bool] = lambda _: True
        self.retry_after = 0.0
        self.answers = self.pushes = True
        self.error = ""
        self._connecting: set[Connection] = set()
        self._scheduled: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._push()

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._scheduled, (self.now + seconds, next(self._order), action))

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while True:
            for command in self.fleet.poll(self.now):
                self._execute(command)
            assert self.fleet.next_wakeup > self.now  # or it would be asked without end
            due = min(self.fleet.next_wakeup, self._scheduled[0][0])
            if due > until:
                self.now = until
                return
            self.now = due
            while self._scheduled and self._scheduled[0][0] <= self.now:
                heapq.heappop(self._scheduled)[2]()

    def deliver(self, connection: Connection, frame: bytes) -> None:
        if connection in self.open_sockets:
            told = self.fleet.receive(connection, frame, self.now)
            self.update_counts[type(told).__name__] += 1

    def shut_down(self) -> None:
        for connection in self.open_sockets:
            self.deliver(connection, b'{"e":"serverShutdown","E":1}')

    def cut(self, connection: Connection) -> None:
        if self.open_sockets.pop(connection, None) is not None:
            self.fleet.on_lost(connection, self.now)

    def covered(self) -> set[str]:
        """What reaches the client."""
        return {stream for socket in self.open_sockets.values() for stream in socket.streams}

    def _execute(self, command: Command) -> None:
        connection = command.member
        if isinstance(command, Open):
            self.open_times.append(self.now)
            self._connecting.add(connection)
            self.after(0.05, lambda: self._complete_handshake(connection, len(self.open_times)))
        elif isinstance(command, Send):
            self._handle_request(connection, command.message)
        else:
            self.closed.append((self.now, command.reason))
            self._connecting.discard(connection)
            self.open_sockets.pop(connection, None)

    def _complete_handshake(self, connection: Connection, number: int) -> None:
        if connection not in self._connecting:
            return
        if self.accepts(number):
            self.open_sockets[connection] = FakeSocket()
            self.fleet.on_opened(connection, self.now)
        else:
            self.fleet.on_lost(connection, self.now, self.retry_after)

    def _handle_request(self, connection: Connection, message: bytes) -> None:
        socket = self.open_sockets.get(connection)
        if socket is None:
            return
        request = orjson.loads(message)
        socket.arrivals.append(self.now)
        socket.methods.append(request["method"])
        if request["method"] == "SUBSCRIBE":
            socket.streams |= set(request["params"])
        elif request["method"] == "UNSUBSCRIBE":
            socket.streams -= set(request["params"])
        assert len(socket.streams) <= 1_024
        if self.answers:
            answer = {"error": {"code": 2, "msg": self.error}} if self.error else {"result": None}
            content = orjson.dumps({**answer, "id": request["id"]})
            self.after(0.02, lambda: self.deliver(connection, content))

    def _push(self) -> None:
        """One stream of every socket, every second."""
        if self.pushes:
            for connection, socket in list(self.open_sockets.items()):
                for stream in sorted(socket.streams)[:1]:
                    self.deliver(connection, kline(stream))
        self.after(1.0, self._push)


def fake_venue(
    streams: int = 3, *, room: int = 400, seed: int = 0, interval: str = "1m"
) -> FakeVenue:
    fleet = ConnectionPool(Random(seed), capacity=room, stall_seconds=STALL, lifetime_seconds=LIFE)
    fleet.follow(followed(*range(streams), interval=interval))
    return FakeVenue(fleet)


def test_it_connects_subscribes_and_hears() -> None:
    v = fake_venue()
    v.run(60)
    assert v.open_times == [0.0]
    assert v.covered() == {name(n) for n in range(3)}
    assert v.update_counts == {"Response": 1, "Kline": 60}
    assert v.closed == []


def test_without_streams_there_is_no_connection() -> None:
    v = fake_venue(0)
    v.run(1_000)
    assert v.open_times == []


def test_frames_become_what_they_tell() -> None:
    v = fake_venue(1)
    v.run(1)
    (connection,) = v.open_sockets

    def receive(frame: bytes) -> object:
        return v.fleet.receive(connection, frame, 2.0)

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
        told.series, "closed or not: 0"
    )
    assert receive(b'{"e":"serverShutdown"}') == ServerShutdown()


def test_streams_are_spread_evenly_and_asked_for_in_steps() -> None:
    v = fake_venue(2_500, room=1_024)
    v.run(30)
    assert sorted(len(socket.streams) for socket in v.open_sockets.values()) == [833, 833, 834]
    assert len(v.covered()) == 2_500
    for socket in v.open_sockets.values():
        assert len(socket.arrivals) == 6
        assert all(b - a >= 0.34 for a, b in pairwise(socket.arrivals))
    assert all(b - a >= fleets.OPEN_INTERVAL_SECONDS for a, b in pairwise(v.open_times))


def test_changes_ask_for_the_difference_and_touch_nothing_else() -> None:
    v = fake_venue(4, room=3)
    v.run(5)
    v.fleet.follow(followed(1, 2, 3, 4, 5))
    v.run(5)
    assert v.covered() == {name(n) for n in (1, 2, 3, 4, 5)}
    assert (len(v.open_times), v.closed) == (2, [])
    assert sum(len(socket.streams) for socket in v.open_sockets.values()) == 5
    v.fleet.follow(followed(5))
    v.run(5)
    assert v.covered() == {name(5)}
    assert [why for _, why in v.closed] == [""]
    v.fleet.follow({})
    v.run(5)
    assert v.open_sockets == {}


def test_where_there_is_no_room_the_old_goes_first() -> None:
    v = fake_venue(1_024, room=1_024)
    v.run(10)
    v.fleet.follow(followed(*range(500, 1_524)))
    v.run(10)
    assert v.covered() == {name(n) for n in range(500, 1_524)}
    assert len(v.open_times) == 1


def test_growth_opens_another_connection() -> None:
    v = fake_venue(3, room=3)
    v.run(5)
    v.fleet.follow(followed(*range(7)))
    v.run(5)
    assert sorted(len(socket.streams) for socket in v.open_sockets.values()) == [2, 2, 3]


def _cut(v: FakeVenue) -> None:
    for connection in list(v.open_sockets):
        v.cut(connection)


def _stall(v: FakeVenue) -> None:
    v.answers = v.pushes = False
    v.after(20, lambda: v.__dict__.update(answers=True, pushes=True))


def _refuse(v: FakeVenue) -> None:
    v.error = "Invalid request"
    v.fleet.follow(followed(1, 2, 3))
    v.after(5, lambda: v.__dict__.update(error=""))
    v.after(6, lambda: v.fleet.follow(followed(0, 1, 2)))


def _stop_answering(v: FakeVenue) -> None:
    v.answers = False
    v.fleet.follow(followed(1, 2))
    v.after(20, lambda: v.__dict__.update(answers=True))
    v.after(21, lambda: v.fleet.follow(followed(0, 1, 2)))


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
def test_after_a_fault_another_connection_takes_its_place(
    fault: Callable[[FakeVenue], None], why: str | None
) -> None:
    v = fake_venue()
    v.run(100)
    v.after(0, lambda: fault(v))
    v.run(100)
    assert len(v.open_times) >= 2
    assert v.covered() == {name(n) for n in range(3)}
    assert len(v.open_sockets) == 1
    if why is not None:
        assert v.closed[0][1] == why


def test_a_silent_server_is_asked_and_soon_left() -> None:
    v = fake_venue()
    v.run(100)
    _stall(v)
    v.run(STALL + RESPONSE_TIMEOUT_SECONDS + 3)
    ((ended, why),) = v.closed
    assert ended == pytest.approx(100 + STALL + RESPONSE_TIMEOUT_SECONDS, abs=1.5)
    assert why == "no answer within 5 s"
    assert len(v.open_times) == 2


def test_a_server_of_quiet_markets_is_kept_for_as_long_as_it_answers() -> None:
    v = fake_venue(1, interval="1h")
    v.pushes = False
    v.run(3_000)
    assert len(v.open_times) == 1
    (socket,) = v.open_sockets.values()
    assert Counter(socket.methods) == {"SUBSCRIBE": 1, "LIST_SUBSCRIPTIONS": 299}


def test_a_server_that_answers_but_pushes_nothing_is_left_ever_less_often() -> None:
    v = fake_venue(1)
    v.pushes = False
    v.run(80)
    assert len(v.open_times) == 1  # 60 s bars, and as long again as it may stall
    v.run(10)
    assert len(v.open_times) == 2
    v.run(3_510)
    assert 5 <= len(v.open_times) <= 7


def test_before_its_time_is_up_the_successor_hears_everything() -> None:
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


def test_a_farewell_is_answered_by_moving_house_first() -> None:
    v = fake_venue(10, room=5)
    v.run(10)
    v.after(0, v.shut_down)
    for _ in range(100):
        v.run(0.1)
        assert len(v.covered()) == 10
    assert (len(v.open_times), len(v.open_sockets), len(v.closed)) == (4, 2, 2)


def test_the_old_connection_stays_until_the_new_one_has_what_was_added_meanwhile() -> None:
    v = fake_venue(3)
    v.run(10)
    v.after(0, v.shut_down)
    v.run(0.5)
    v.answers = False
    v.fleet.follow(followed(*range(5)))
    v.run(3.5)
    assert len(v.open_sockets) == 2
    v.answers = True
    v.run(10)
    assert len(v.open_sockets) == 1
    assert len(v.covered()) == 5


def test_a_move_that_fails_is_tried_again_while_the_old_connection_serves() -> None:
    v = fake_venue()
    v.run(10)
    v.accepts = lambda number: number > 4
    v.after(0, v.shut_down)
    for _ in range(200):
        v.run(0.1)
        assert len(v.covered()) == 3
    assert len(v.open_times) == 5
    assert len(v.open_sockets) == 1


def test_failures_are_followed_by_growing_pauses_until_it_is_healthy_again() -> None:
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


def test_a_connection_that_never_lasts_is_not_opened_at_full_speed() -> None:
    v = fake_venue()
    for _ in range(600):
        v.run(1)
        _cut(v)
    assert len(v.open_times) < 40


def test_when_told_to_wait_nobody_connects() -> None:
    v = fake_venue(10, room=2)
    v.accepts = lambda _: False
    v.retry_after = 100.0
    v.run(99)
    assert len(v.open_times) <= 1
    v.accepts = lambda _: True
    v.run(10)
    assert len(v.covered()) == 10


def test_there_are_never_more_attempts_than_the_venue_allows() -> None:
    v = fake_venue(100, room=1)

    def cut() -> None:
        _cut(v)
        v.after(0.7, cut)

    cut()
    v.run(1_500)
    for first, later in zip(v.open_times, v.open_times[fleets.MAX_ATTEMPTS :], strict=False):
        assert later - first > fleets.ATTEMPT_WINDOW_SECONDS - 0.001
    assert len(v.open_times) > 800  # and it makes use of them


def test_word_of_connections_that_are_gone_changes_nothing() -> None:
    v = fake_venue()
    v.run(10)
    (old,) = v.open_sockets
    _cut(v)
    v.fleet.on_lost(old, v.now)
    v.fleet.on_opened(old, v.now)
    v.fleet.receive(old, b'{"e":"serverShutdown"}', v.now)
    v.run(10)
    assert len(v.open_times) == 2
    assert len(v.open_sockets) == 1


def _fault(v: FakeVenue, random: Random) -> None:
    """Any of what may happen."""
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
            lambda: v.fleet.follow(followed(*some)),
            lambda: change(accepts=lambda number: Random(f"{chance} {number}").random() < chance),
            lambda: change(retry_after=30.0 if chance < 0.3 else 0.0),
            lambda: change(answers=chance < 0.6),
            lambda: change(pushes=chance < 0.6),
            lambda: change(error="refused" if chance < 0.3 else ""),
        )
    )()


@pytest.mark.parametrize("seed", range(10))
def test_whatever_happens_it_keeps_the_rules_and_comes_back(seed: int) -> None:
    _run_random_faults(seed)


@pytest.mark.soak
def test_whatever_happens_in_hundreds_of_lives() -> None:
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
    v.fleet.follow(followed(*range(20)))
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


def test_a_connection_that_is_not_open_has_nothing_to_say() -> None:
    one = Connection(stall_seconds=STALL, lifetime_seconds=LIFE)
    one.assign({"a"}, 60)
    assert one.next_request(0) is None
    assert one.next_wakeup(0) == NEVER
    assert one.failure(1e9) == ""
    assert not one.expired(1e9)


def test_it_wakes_no_later_than_something_is_due() -> None:
    one = Connection(stall_seconds=STALL, lifetime_seconds=LIFE)
    one.assign({"a"}, 80)
    one.on_opened(100)
    assert one.next_request(100) is not None
    assert one.next_wakeup(100) == pytest.approx(100.35)  # when it may speak again
    assert one.next_wakeup(101) == 100 + RESPONSE_TIMEOUT_SECONDS
    one.on_response(Response(1, ""), 101)
    one.on_activity(101)
    assert one.next_wakeup(101) == 101 + STALL
    one.on_candle(120)
    assert one.next_wakeup(150) == 200
    assert one.next_wakeup(1_000) == 100 + LIFE
