"""The pages' server, with clients as they should be, and as they should not."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import Any

import aiohttp
import pytest
from pydantic import SecretStr

from kronos_stream.daemon.config.settings import HttpSettings, SettingsError
from kronos_stream.daemon.status.endpoints import Endpoints, Response
from kronos_stream.daemon.status.series import SeriesStatusRegistry
from kronos_stream.daemon.status.server import IDLE_SECONDS, MAX_CONNECTIONS, StatusServer
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.market.clock import SystemClock
from kronos_stream.testing.virtual_time import run_virtual

TOKEN = "a-long-enough-token"  # noqa: S105 - of this test alone
LARGE = 20 * 2**20
"""More than the sockets' buffers hold."""
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@asynccontextmanager
async def served(
    host: str = "127.0.0.1", port: int = 0, **more: Any
) -> AsyncIterator[StatusServer]:
    """Pages, one of which is large."""
    clock = SystemClock()
    pages = Endpoints(Metrics(), dict, SeriesStatusRegistry(clock), clock, **more)

    async def large() -> Response:
        return Response(200, b"x" * LARGE)

    async def broken() -> Response:
        raise ZeroDivisionError

    pages._routes |= {"/large": large, "/broken": broken}
    async with StatusServer(HttpSettings(host=host, port=port), pages) as served:
        yield served


async def get(port: int, path: str = "/healthz", **headers: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{port}{path}"
    timeout = aiohttp.ClientTimeout(300)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(url, headers=headers) as answer,
    ):
        return answer.status, await answer.text()


async def connected(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What still came until the connection ended."""
    received = b""
    with suppress(ConnectionError):
        while more := await reader.read(65_536):
            received += more
    return received


async def test_pages_are_served() -> None:
    async with served(token=SecretStr(TOKEN)) as server:
        assert await get(server.port) == (200, "alive\n")
        assert (await get(server.port, "/series"))[0] == 401
        assert (await get(server.port, "/series", Authorization=f"Bearer {TOKEN}"))[0] == 200
        assert (await get(server.port, "/metrics", Authorization=f"Bearer {TOKEN}x"))[0] == 401
        status, why = await get(server.port, "/broken", Authorization=f"Bearer {TOKEN}")
        assert (status, "the daemon's log says why" in why) == (500, True)


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", 200), ("0.0.0.0", 403)])  # noqa: S104
async def test_without_a_token_only_the_loopback_is_shown_series(host: str, status: int) -> None:
    async with served(host) as server:
        assert (await get(server.port, "/series"))[0] == status
        assert (await get(server.port, "/metrics"))[0] == 200


async def test_a_taken_port_is_a_fault_of_the_settings() -> None:
    async with served() as first:
        expected = f"KRONOS_STREAM_HTTP__PORT={first.port}: another program listens"
        with pytest.raises(SettingsError, match=expected):
            async with served(port=first.port):
                pass
        assert (await get(first.port))[0] == 200
    # Given back at once, for whoever starts next.
    async with served(port=first.port) as second:
        assert second.port == first.port


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
async def test_a_foreign_address_is_a_fault_of_the_settings(host: str) -> None:
    with pytest.raises(SettingsError, match=f"HTTP__HOST={host}: is no address of this machine"):
        async with served(host):
            pass


async def test_a_client_that_stays_does_not_hold_up_the_end() -> None:
    async with served() as server:
        slow, writer = await connected(server.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")  # and no more
        stuck = _greedy(server.port)
        stuck.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")  # and does not read
        await asyncio.sleep(0.2)
        began = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - began < 60
    assert await slow.read() == b""
    writer.close()
    stuck.close()


# Clients that take their time. Virtual seconds, real sockets.


def test_who_never_finishes_a_request_is_shown_out() -> None:
    async def drips(port: int) -> float:
        reader, writer = await connected(port)
        began = asyncio.get_running_loop().time()
        with suppress(ConnectionError):
            for byte in b"GET /healthz HTTP/1.1\r\nX-Slow: " + b"x" * 1_000:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.5)
                if reader.at_eof():
                    break
        writer.close()
        return asyncio.get_running_loop().time() - began

    lasted = _virtually(drips)
    assert IDLE_SECONDS <= lasted < IDLE_SECONDS + 2


def test_who_says_nothing_is_shown_out() -> None:
    async def waits(port: int) -> float:
        reader, writer = await connected(port)
        began = asyncio.get_running_loop().time()
        assert await ended(reader) == b""
        writer.close()
        return asyncio.get_running_loop().time() - began

    assert IDLE_SECONDS <= _virtually(waits) < IDLE_SECONDS + 2


def test_who_does_not_read_is_shown_out() -> None:
    async def stuffs(port: int) -> float:
        client = _greedy(port)
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(IDLE_SECONDS - 1)
        got = 0
        await asyncio.sleep(2)
        with suppress(ConnectionError):
            while more := client.recv(65_536):
                got += len(more)
        client.close()
        return got

    # Only what was in the sockets' buffers is left: the rest was not kept for it.
    assert 0 < _virtually(stuffs) < LARGE


def test_who_asks_now_and_then_is_kept() -> None:
    async def asks(port: int) -> int:
        reader, writer = await connected(port)
        for _ in range(10):
            writer.write(HEALTH)
            answer = await reader.readuntil(b"alive\n")
            assert answer.startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.9 * IDLE_SECONDS)
        writer.close()
        return 10

    assert _virtually(asks) == 10


async def test_nobody_can_lock_out_a_probe() -> None:
    async with served() as server:
        crowd = [await connected(server.port) for _ in range(3 * MAX_CONNECTIONS)]
        for _, writer in crowd:
            with suppress(ConnectionError):
                writer.write(b"GET /")
                await writer.drain()
        assert await get(server.port) == (200, "alive\n")
        await asyncio.sleep(0.1)
        inside = [reader for reader, _ in crowd if not reader.at_eof()]
        assert MAX_CONNECTIONS - 2 <= len(inside) <= MAX_CONNECTIONS
        for _, writer in crowd:
            writer.close()


async def test_who_was_answered_lately_stays_longest() -> None:
    async with served() as server:
        reader, writer = await connected(server.port)
        crowd = [await connected(server.port) for _ in range(MAX_CONNECTIONS - 1)]
        writer.write(HEALTH)
        await reader.readuntil(b"alive\n")
        crowd += [await connected(server.port) for _ in range(MAX_CONNECTIONS // 2)]
        writer.write(HEALTH)
        await reader.readuntil(b"alive\n")
        for _, one in crowd:
            one.close()
        writer.close()


# Clients that are none.


async def test_garbage_is_harmless(caplog: pytest.LogCaptureFixture) -> None:
    random = Random(7)
    caplog.set_level(logging.DEBUG)
    async with served() as server:
        for number in range(150):
            reader, writer = await connected(server.port)
            writer.write(_garbage(random, number))
            with suppress(ConnectionError):
                await writer.drain()
                writer.write_eof()
            received = await asyncio.wait_for(ended(reader), 300)
            assert received == b"" or received.startswith(b"HTTP/1."), received[:80]
            assert b"Traceback" not in received
            writer.close()
        assert await get(server.port) == (200, "alive\n")
    assert [line.name for line in caplog.records if line.name.startswith(("aiohttp", "asyncio"))] \
        == []  # fmt: skip


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 100_000 + b"\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999999\r\n\r\n" + b"a" * 10**6,
        b"POST /series HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nfffff\r\n"
        + b"a" * 10**6,
    ],
    ids=["line", "header", "headers", "length", "chunks"],
)  # fmt: skip
async def test_what_is_too_large_is_not_taken_in(head: bytes) -> None:
    async with served() as server:
        reader, writer = await connected(server.port)
        with suppress(ConnectionError):
            writer.write(head)
            await writer.drain()
        received = await asyncio.wait_for(ended(reader), 300)  # and it ends the connection
        assert received[9:12] in {b"", b"400", b"200", b"405"}
        assert await get(server.port) == (200, "alive\n")
        writer.close()


def _garbage(random: Random, number: int) -> bytes:
    noise = random.randbytes(random.randrange(1, 5_000))
    return [
        noise,
        b"GET /series HTTP/1.1\r\n" + noise,
        b"GET /forecasts/" + noise.hex().encode()[:2_000] + b"%ff%00%zz HTTP/1.1\r\nHost: x\r\n"
        b"Connection: close\r\n\r\n",
        b"\x16\x03\x01" + noise,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + noise,
        b"GET /series HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n"
        + noise,
    ][number % 6]  # fmt: skip


def _greedy(port: int) -> socket.socket:
    """A client whose kernel buffers little."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    client.settimeout(5)
    client.connect(("127.0.0.1", port))
    return client


def _virtually(client: Callable[[int], Awaitable[float]]) -> float:
    async def main() -> float:
        async with served() as server:
            return await client(server.port)

    return run_virtual(main())
