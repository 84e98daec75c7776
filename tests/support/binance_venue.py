"""Binance in memory, for tests of connection pools: no sockets and no clock."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from itertools import count
from random import Random

import orjson

from kronos_connectors._shared.rotating_pool import Open
from kronos_connectors.binance.connection import Connection, Send
from kronos_connectors.binance.pool import Command, ConnectionPool
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
    """Socket as the venue sees it."""

    def __init__(self) -> None:
        self.streams: set[str] = set()
        self.arrivals: list[float] = []
        self.methods: list[str] = []


class FakeVenue:
    """Venue that a pool connects to; time jumps to the next event."""

    def __init__(self, pool: ConnectionPool) -> None:
        self.pool, self.now = pool, 0.0
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
            for command in self.pool.poll(self.now):
                self._execute(command)
            assert self.pool.next_wakeup > self.now  # otherwise this loop would not end
            due = min(self.pool.next_wakeup, self._scheduled[0][0])
            if due > until:
                self.now = until
                return
            self.now = due
            while self._scheduled and self._scheduled[0][0] <= self.now:
                heapq.heappop(self._scheduled)[2]()

    def deliver(self, connection: Connection, frame: bytes) -> None:
        if connection in self.open_sockets:
            update = self.pool.receive(connection, frame, self.now)
            self.update_counts[type(update).__name__] += 1

    def shut_down(self) -> None:
        for connection in self.open_sockets:
            self.deliver(connection, b'{"e":"serverShutdown","E":1}')

    def cut(self, connection: Connection) -> None:
        if self.open_sockets.pop(connection, None) is not None:
            self.pool.on_lost(connection, self.now)

    def covered(self) -> set[str]:
        """Streams of all open sockets."""
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
            self.pool.on_opened(connection, self.now)
        else:
            self.pool.on_lost(connection, self.now, self.retry_after)

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
        """Push one stream of every socket once a second."""
        if self.pushes:
            for connection, socket in list(self.open_sockets.items()):
                for stream in sorted(socket.streams)[:1]:
                    self.deliver(connection, kline(stream))
        self.after(1.0, self._push)


def fake_venue(
    streams: int = 3, *, room: int = 400, seed: int = 0, interval: str = "1m"
) -> FakeVenue:
    pool = ConnectionPool(Random(seed), capacity=room, stall_seconds=STALL, lifetime_seconds=LIFE)
    pool.follow(followed(*range(streams), interval=interval))
    return FakeVenue(pool)
