"""Virtual time: waiting takes no time; sockets and threads still work."""

from __future__ import annotations

import asyncio
import time

import pytest

from kronos_stream.market.clock import LoopClock, ManualClock
from kronos_stream.testing.virtual_time import run_virtual


@pytest.mark.virtual_time
async def test_tasks_wake_in_order_after_a_day_of_virtual_time() -> None:
    woken: list[int] = []

    clock = LoopClock(1_000)

    async def wait(seconds: int) -> None:
        await clock.sleep(seconds)
        woken.append(clock.now())

    await asyncio.gather(*(wait(s) for s in (86_400, 1, 3_600)))
    assert woken == [2_000, 3_601_000, 86_401_000]
    assert asyncio.get_running_loop().time() == 86_400


@pytest.mark.virtual_time
async def test_time_stands_still_while_a_thread_works() -> None:
    loop = asyncio.get_running_loop()
    late = asyncio.create_task(asyncio.sleep(10))
    await loop.run_in_executor(None, time.sleep, 0.2)
    now = loop.time()
    await late
    assert now == 0


@pytest.mark.virtual_time
async def test_socket_delivers_before_its_reader_times_out() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = []
    for i in range(200):
        writer.write(b"%d\n" % i)
        async with asyncio.timeout(0.01):
            lines.append(await reader.readline())
        await asyncio.sleep(1)
    writer.close()
    server.close()
    assert lines == [b"%d\n" % i for i in range(200)]


def test_run_virtual_returns_the_result() -> None:
    async def main() -> float:
        await asyncio.sleep(3_600)
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == 3_600


async def test_manual_clock_moves_only_when_advanced() -> None:
    clock = ManualClock(0)
    woken = []

    async def wait(moment: int) -> None:
        await clock.sleep_until(moment)
        woken.append(moment)

    tasks = [asyncio.create_task(wait(moment)) for moment in (30, 10, 20)]
    await asyncio.sleep(0)
    assert clock.now() == 0
    clock.advance(20)
    await asyncio.sleep(0)
    assert woken == [10, 20]
    clock.advance(30)
    await asyncio.gather(*tasks)
    assert woken == [10, 20, 30]
