"""HTTP server with well-behaved and with hostile clients."""

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
from aiohttp import web
from pydantic import SecretStr

from kronos_stream.daemon.config.settings import HttpSettings, SettingsError
from kronos_stream.daemon.status.endpoints import Endpoints
from kronos_stream.daemon.status.series import SeriesStatusRegistry
from kronos_stream.daemon.status.server import IDLE_SECONDS, MAX_CONNECTIONS, StatusServer
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.market.clock import SystemClock
from kronos_stream.testing.virtual_time import run_virtual

TOKEN = "a-long-enough-token"  # noqa: S105 - an example
LARGE = 20 * 2**20
"""More bytes than the sockets' buffers hold."""
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
TIMEOUT_SECONDS = 300.0


@asynccontextmanager
async def served(
    host: str = "127.0.0.1", port: int = 0, **options: Any
) -> AsyncIterator[StatusServer]:
    """Server with two more endpoints: /large, and /broken, which raises an exception."""
    clock = SystemClock()
    endpoints = Endpoints(Metrics(), dict, SeriesStatusRegistry(clock), clock, **options)

    async def large(_: web.Request) -> web.Response:
        return web.Response(body=b"x" * LARGE)

    async def broken(_: web.Request) -> web.Response:
        raise ZeroDivisionError

    endpoints.app.router.add_get("/large", large)
    endpoints.app.router.add_get("/broken", broken)
    async with StatusServer(HttpSettings(host=host, port=port), endpoints) as server:
        yield server


async def get(port: int, path: str = "/healthz", **headers: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{port}{path}"
    timeout = aiohttp.ClientTimeout(TIMEOUT_SECONDS)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(url, headers=headers) as response,
    ):
        return response.status, await response.text()


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    """Return what arrives before the connection ends."""
    received = b""
    with suppress(ConnectionError):
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while more := await reader.read(65_536):
                received += more
    return received


async def test_endpoints_are_served() -> None:
    async with served(token=SecretStr(TOKEN)) as server:
        assert await get(server.port) == (200, "alive\n")
        assert (await get(server.port, "/series"))[0] == 401
        assert (await get(server.port, "/series", Authorization=f"Bearer {TOKEN}"))[0] == 200
        assert (await get(server.port, "/metrics", Authorization=f"Bearer {TOKEN}x"))[0] == 401
        status, why = await get(server.port, "/broken", Authorization=f"Bearer {TOKEN}")
        assert (status, "see the daemon's log" in why) == (500, True)


async def test_token_that_is_not_unicode_is_rejected() -> None:
    async with served(token=SecretStr(TOKEN)) as server:
        reader, writer = await connect(server.port)
        writer.write(b"GET /series HTTP/1.1\r\nHost: x\r\nConnection: close\r\n")
        writer.write(b"Authorization: Bearer \xff\xe2\x82\xac\r\n\r\n")
        assert (await read_to_end(reader)).startswith(b"HTTP/1.1 401 ")
        writer.close()


async def test_path_may_be_percent_encoded() -> None:
    async with served() as server:
        status, text = await get(server.port, "/forecasts/binance%3ABTC%2FUSDT:1m")
        assert (status, "binance:BTC/USDT:1m is not followed" in text) == (404, True)


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", 200), ("0.0.0.0", 403)])  # noqa: S104
async def test_remote_clients_need_a_token_for_series(host: str, status: int) -> None:
    async with served(host) as server:
        assert (await get(server.port, "/series"))[0] == status
        assert (await get(server.port, "/metrics"))[0] == 200


async def test_port_in_use_is_a_settings_error() -> None:
    async with served() as first:
        expected = f"KRONOS_STREAM_HTTP__PORT={first.port}: another program listens"
        with pytest.raises(SettingsError, match=expected):
            async with served(port=first.port):
                pass
        assert (await get(first.port))[0] == 200
    # The port is free again at once.
    async with served(port=first.port) as second:
        assert second.port == first.port


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
async def test_foreign_address_is_a_settings_error(host: str) -> None:
    with pytest.raises(SettingsError, match=f"HTTP__HOST={host}: not an address of this machine"):
        async with served(host):
            pass


async def test_unfinished_requests_do_not_prevent_the_stop() -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        async with served() as server:
            slow, writer = await connect(server.port)
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")  # the rest never comes
            stuck = _unread_client(server.port)
            stuck.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.sleep(0.2)
        assert await slow.read() == b""
    writer.close()
    stuck.close()


# Slow clients, in virtual time with real sockets.


def test_unfinished_request_is_evicted() -> None:
    async def send_slowly(port: int) -> float:
        reader, writer = await connect(port)
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

    assert IDLE_SECONDS <= _run_client(send_slowly) < IDLE_SECONDS + 2


def test_idle_connection_is_evicted() -> None:
    async def wait(port: int) -> float:
        reader, writer = await connect(port)
        began = asyncio.get_running_loop().time()
        assert await read_to_end(reader) == b""
        writer.close()
        return asyncio.get_running_loop().time() - began

    assert IDLE_SECONDS <= _run_client(wait) < IDLE_SECONDS + 2


def test_client_that_does_not_read_is_evicted() -> None:
    async def receive_late(port: int) -> float:
        client = _unread_client(port)
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(IDLE_SECONDS - 1)
        got = 0
        await asyncio.sleep(2)
        with suppress(ConnectionError):
            while more := client.recv(65_536):
                got += len(more)
        client.close()
        return got

    # Only the content of the sockets' buffers arrives; the rest was dropped.
    assert 0 < _run_client(receive_late) < LARGE


def test_active_connection_is_kept() -> None:
    async def request_regularly(port: int) -> int:
        reader, writer = await connect(port)
        for _ in range(10):
            writer.write(HEALTH)
            response = await reader.readuntil(b"alive\n")
            assert response.startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.9 * IDLE_SECONDS)
        writer.close()
        return 10

    assert _run_client(request_regularly) == 10


async def test_idle_connections_do_not_block_a_probe() -> None:
    async with served() as server:
        idle = [await connect(server.port) for _ in range(3 * MAX_CONNECTIONS)]
        for _, writer in idle:
            with suppress(ConnectionError):
                writer.write(b"GET /")
                await writer.drain()
        assert await get(server.port) == (200, "alive\n")
        await asyncio.sleep(0.1)
        inside = [reader for reader, _ in idle if not reader.at_eof()]
        assert MAX_CONNECTIONS - 2 <= len(inside) <= MAX_CONNECTIONS
        for _, writer in idle:
            writer.close()


async def test_connection_idle_for_longest_is_evicted_first() -> None:
    async with served() as server:
        reader, writer = await connect(server.port)
        idle = [await connect(server.port) for _ in range(MAX_CONNECTIONS - 1)]
        writer.write(HEALTH)
        await reader.readuntil(b"alive\n")
        idle += [await connect(server.port) for _ in range(MAX_CONNECTIONS // 2)]
        writer.write(HEALTH)
        await reader.readuntil(b"alive\n")
        for _, idle_writer in idle:
            idle_writer.close()
        writer.close()


# Invalid requests.


async def test_invalid_requests_are_answered_or_dropped(caplog: pytest.LogCaptureFixture) -> None:
    random = Random(7)
    caplog.set_level(logging.DEBUG)
    async with served() as server:
        for number in range(150):
            reader, writer = await connect(server.port)
            writer.write(_garbage(random, number))
            with suppress(ConnectionError):
                await writer.drain()
                writer.write_eof()
            received = await read_to_end(reader)
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
async def test_too_large_request_ends_the_connection(head: bytes) -> None:
    async with served() as server:
        reader, writer = await connect(server.port)
        with suppress(ConnectionError):
            writer.write(head)
            await writer.drain()
        received = await read_to_end(reader)
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


def _unread_client(port: int) -> socket.socket:
    """Client with a small receive buffer."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    client.settimeout(TIMEOUT_SECONDS)
    client.connect(("127.0.0.1", port))
    return client


def _run_client(client: Callable[[int], Awaitable[float]]) -> float:
    async def main() -> float:
        async with served() as server:
            return await client(server.port)

    return run_virtual(main())
