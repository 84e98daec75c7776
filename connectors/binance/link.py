"""A websocket to Binance: the socket around a :class:`Session`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from kronos_connectors.binance.session import Session
from kronos_stream.market.source import SourceError, VenueRefused

_FINAL = {403, 451}
_PING_SECONDS = 20.0
_CLOSE_SECONDS = 2.0
_MOST_BYTES = 2**20

Frame = Callable[[Session, str | bytes], None]


class Link:
    """An open connection; ``run`` works it until it is of no more use."""

    def __init__(self, socket: ClientConnection, session: Session, frame: Frame) -> None:
        self.session = session
        self._socket, self._frame = socket, frame
        self._loop = asyncio.get_running_loop()
        self.poke = asyncio.Event()
        """Set it after the session was told of other streams."""

    @classmethod
    async def open(
        cls, url: str, make: Callable[[float], Session], frame: Frame, limit: float
    ) -> Self:
        """Connect within ``limit`` seconds. Raises SourceError or VenueRefused."""
        try:
            socket = await connect(
                url,
                open_timeout=limit,
                close_timeout=_CLOSE_SECONDS,
                ping_interval=_PING_SECONDS,
                ping_timeout=_PING_SECONDS,
                max_size=_MOST_BYTES,
                compression=None,  # kline frames are small, and a core is dear
            )
        except InvalidStatus as error:
            status = error.response.status_code
            kind = VenueRefused if status in _FINAL else SourceError
            raise kind(f"{url}: HTTP {status}") from error
        except (OSError, InvalidHandshake, InvalidURI, EOFError) as error:
            raise SourceError(f"{url}: {error or type(error).__name__}") from error
        return cls(socket, make(asyncio.get_running_loop().time()), frame)

    async def run(self) -> str:
        """Read and keep subscribed; returns why it ended, and closes."""
        reading = asyncio.create_task(self._read())
        keeping = asyncio.create_task(self._keep())
        try:
            done, _ = await asyncio.wait((reading, keeping), return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            reading.cancel()
            keeping.cancel()
            await asyncio.wait((reading, keeping))
            with suppress(TimeoutError, OSError, ConnectionClosed):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self._socket.close()

    async def _read(self) -> str:
        session = self.session
        try:
            while True:
                frame = await self._socket.recv()
                session.heard(self._loop.time())
                self._frame(session, frame)
        except ConnectionClosed as error:
            return f"closed: {error}"

    async def _keep(self) -> str:
        session = self.session
        while True:
            self.poke.clear()
            now = self._loop.time()
            if broken := session.broken(now):
                return broken
            try:
                for request in session.requests(now):
                    await self._socket.send(request, text=True)
            except ConnectionClosed as error:
                return f"closed: {error}"
            with suppress(TimeoutError):
                async with asyncio.timeout(min(max(0.05, session.wake(now)), 1.0)):
                    await self.poke.wait()
