"""WebSocket streams: connections, their subscriptions and their limits."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import orjson
from aiohttp import WSMsgType, web

from kronos_stream.testing.exchange.bar_simulator import BarSimulator
from kronos_stream.testing.exchange.frames import Kline, KlineWriter, frame, ping

MAX_STREAMS = 1_024
MAX_MESSAGES_PER_SECOND = 5
PING_SECONDS = 20.0
PONG_SECONDS = 60.0
_MAX_UNSENT_BYTES = 16 << 20
_POLICY_VIOLATION = 1008

_METHODS = ("SUBSCRIBE", "UNSUBSCRIBE", "LIST_SUBSCRIPTIONS", "SET_PROPERTY", "GET_PROPERTY")


@dataclass(eq=False, slots=True)
class Stream:
    """A kline stream and its subscribers."""

    index: int
    """Position of the instrument."""
    symbol: str
    """Symbol of the instrument, in ccxt's notation."""
    interval: str
    writer: KlineWriter
    listeners: set[Connection] = field(default_factory=set)


class Streams:
    """All kline streams of spot and futures, and all connections."""

    def __init__(self, bars: BarSimulator) -> None:
        self._bars = bars
        self._indices = {
            (instrument.perpetual, instrument.name.lower()): index
            for index, instrument in enumerate(bars.instruments)
        }
        self._streams: dict[tuple[bool, str], Stream] = {}
        self.connections: set[Connection] = set()
        self._unflushed: set[Connection] = set()

    def find(self, name: str, *, futures: bool) -> Stream | None:
        """The stream ``name``, or None; the venue accepts unknown names, and sends nothing."""
        stream = self._streams.get((futures, name))
        if stream is None:
            symbol, _, interval = name.partition("@kline_")
            index = self._indices.get((futures, symbol))
            if index is None or interval not in self._bars.histories:
                return None
            instrument = self._bars.instruments[index]
            writer = KlineWriter(instrument, interval)
            stream = Stream(index, instrument.symbol, interval, writer)
            self._streams[futures, name] = stream
        return stream

    def subscribed(self, interval: str) -> list[Stream]:
        """Streams of one interval that have subscribers."""
        return [s for s in self._streams.values() if s.listeners and s.interval == interval]

    def push(self, stream: Stream, kline: Kline) -> None:
        """Queue a kline for all subscribers, until the next :meth:`flush`."""
        raw = combined = b""  # encoded once, and only if needed
        for connection in stream.listeners:
            if connection.combined:
                combined = combined or frame(kline.combined())
                connection.unsent.append(combined)
            else:
                raw = raw or frame(kline.raw)
                connection.unsent.append(raw)
            self._unflushed.add(connection)

    def flush(self) -> None:
        for connection in self._unflushed:
            connection.flush()
        self._unflushed.clear()


class Connection:
    """One client's websocket, after its handshake."""

    def __init__(
        self,
        socket: web.WebSocketResponse,
        transport: asyncio.Transport,
        streams: Streams,
        *,
        futures: bool,
        combined: bool,
    ) -> None:
        self._socket, self._transport, self._streams = socket, transport, streams
        self._futures, self.combined = futures, combined
        self.unsent: list[bytes] = []
        self._names: dict[str, Stream | None] = {}
        self._message_times: deque[float] = deque(maxlen=MAX_MESSAGES_PER_SECOND + 1)
        self._last_pong = asyncio.get_running_loop().time()
        self._stalled = False

    @property
    def is_receiving(self) -> bool:
        """Return whether pushes will arrive, as far as the exchange knows."""
        return not self._stalled and not self._transport.is_closing()

    # -- sending -----------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Send a frame at once."""
        self.unsent.append(data)
        self.flush()

    def flush(self) -> None:
        data = b"".join(self.unsent)
        self.unsent.clear()
        if not self.is_receiving:
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            self._transport.abort()  # a client that does not read

    def stall(self) -> None:
        """Stop sending and answering, as when a router on the way fails."""
        self._stalled = True

    def abort(self) -> None:
        """Cut the connection without a close frame."""
        self._transport.abort()

    async def close(self, code: int = 1000, reason: str = "") -> None:
        with suppress(ConnectionError, RuntimeError):
            await self._socket.close(code=code, message=reason.encode())

    # -- receiving ---------------------------------------------------------------------------

    async def serve(self, names: Sequence[str]) -> None:
        """Run until the client disconnects or is disconnected."""
        self._streams.connections.add(self)
        try:
            try:
                self._subscribe(names)
            except _InvalidRequest as error:
                await self.close(_POLICY_VIOLATION, error.message)
                return
            async with asyncio.TaskGroup() as group:
                pinging = group.create_task(self._ping())
                await self._listen()
                pinging.cancel()
        finally:
            self._unsubscribe(list(self._names))
            self._streams.connections.discard(self)

    async def _ping(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(PING_SECONDS)
            if self._stalled:
                return
            if loop.time() - self._last_pong > PONG_SECONDS:
                self.abort()
                return
            self.send(ping(str(round(loop.time() * 1000)).encode()))

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            message = await self._socket.receive()
            if message.type not in {
                WSMsgType.TEXT, WSMsgType.BINARY, WSMsgType.PING, WSMsgType.PONG
            }:  # fmt: skip
                return
            if self._stalled:
                continue
            self._message_times.append(loop.time())
            full = len(self._message_times) > MAX_MESSAGES_PER_SECOND
            if full and self._message_times[-1] - self._message_times[0] < 1.0:
                await self.close(_POLICY_VIOLATION, "Too many requests")
                return
            if message.type is WSMsgType.PONG:
                self._last_pong = loop.time()
            elif message.type is WSMsgType.PING:
                self.send(frame(message.data, 0x8A))
            else:
                self.send(frame(orjson.dumps(self._handle_request(message.data))))

    def _handle_request(self, data: str | bytes) -> dict[str, object]:
        try:
            request = orjson.loads(data)
        except orjson.JSONDecodeError:
            return _error(3, "Invalid JSON: expected value at line 1 column 1")
        if not isinstance(request, dict) or "method" not in request:
            return _error(2, "Invalid request: missing field `method` at line 1 column 2")
        number = request.get("id")
        if isinstance(number, bool) or not isinstance(number, int | str | None):
            return _error(2, "Invalid request: request ID must be an unsigned integer")
        try:
            result = self._execute(request["method"], request.get("params", []))
        except _InvalidRequest as error:
            return _error(error.code, error.message, number)
        return {"result": result, "id": number}

    def _execute(self, method: object, params: object) -> object:
        """Result of a request. Raises _InvalidRequest."""
        if method == "LIST_SUBSCRIPTIONS":
            return list(self._names)
        if not isinstance(params, list):
            raise _InvalidRequest(2, "Invalid request: params must be a list")
        if method in {"SUBSCRIBE", "UNSUBSCRIBE"}:
            if not all(isinstance(name, str) for name in params):
                raise _InvalidRequest(2, "Invalid request: stream name must be a string")
            if method == "UNSUBSCRIBE":
                self._unsubscribe(params)
            else:
                self._subscribe(params)
            return None
        if method not in {"SET_PROPERTY", "GET_PROPERTY"}:
            known = ", ".join(f"`{name}`" for name in _METHODS)
            raise _InvalidRequest(
                2, f"Invalid request: unknown variant {method}, expected one of {known}"
            )
        if params[:1] != ["combined"]:
            raise _InvalidRequest(0, "Unknown property")
        if method == "GET_PROPERTY":
            return self.combined
        if len(params) != 2 or not isinstance(params[1], bool):
            raise _InvalidRequest(1, "Invalid value type: expected Boolean")
        self.combined = params[1]
        return None

    def _subscribe(self, names: Sequence[str]) -> None:
        if len(self._names.keys() | set(names)) > MAX_STREAMS:
            raise _InvalidRequest(2, f"Invalid request: more than {MAX_STREAMS} streams")
        for name in names:
            stream = self._names[name] = self._streams.find(name, futures=self._futures)
            if stream is not None:
                stream.listeners.add(self)

    def _unsubscribe(self, names: Sequence[str]) -> None:
        for name in names:
            stream = self._names.pop(name, None)
            if stream is not None:
                stream.listeners.discard(self)


class _InvalidRequest(Exception):  # noqa: N818
    """An invalid request."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def _error(code: int, message: str, number: int | str | None = None) -> dict[str, object]:
    return {"error": {"code": code, "msg": message}, "id": number}
