"""Request weight of Binance, and the pauses that it asks for."""

from __future__ import annotations

import asyncio

import pytest

from kronos_connectors._shared.http_status import parse_retry_after
from kronos_connectors.binance.rate_limit import WeightLimiter
from kronos_stream.interfaces.source import SourceError
from kronos_stream.market.clock import LoopClock, ManualClock

START = 1_750_000_020_000
MINUTE = 60_000


@pytest.mark.virtual_time
async def test_weight_is_given_out_evenly_and_in_order() -> None:
    limiter, loop = WeightLimiter(600, 0.5, LoopClock(START)), asyncio.get_running_loop()
    spent: list[tuple[int, float]] = []

    async def spend(number: int) -> None:
        await limiter.acquire(5)
        spent.append((number, loop.time()))

    await asyncio.gather(*(spend(number) for number in range(65)))
    assert [number for number, _ in spent] == list(range(65))
    times = [time for _, time in spent]
    assert times[4] == 0  # five seconds' worth at once
    assert 59 < times[-1] < 62  # 5 a second
    assert all(later - first > 55 for first, later in zip(times, times[60:], strict=False))


@pytest.mark.virtual_time
async def test_pause_fails_waiting_requests() -> None:
    limiter = WeightLimiter(600, 0.5, LoopClock(START))
    await limiter.acquire(25)
    waiting = [asyncio.create_task(limiter.acquire(5)) for _ in range(3)]
    await asyncio.sleep(0)
    limiter.pause(120)
    for task in waiting:
        with pytest.raises(SourceError) as raised:
            await task
        assert 118 < raised.value.retry_after <= 120
    await asyncio.sleep(121)
    await limiter.acquire(5)


@pytest.mark.virtual_time
async def test_cancelled_request_does_not_block_the_next() -> None:
    limiter = WeightLimiter(600, 0.5, LoopClock(START))
    await limiter.acquire(25)
    first, second = (asyncio.create_task(limiter.acquire(25)) for _ in range(2))
    await asyncio.sleep(1)
    first.cancel()
    async with asyncio.timeout(6):
        await second


@pytest.mark.virtual_time
async def test_weight_of_other_programs_pauses_until_the_minute_ends() -> None:
    limiter = WeightLimiter(6_000, 0.5, LoopClock(START))
    venue_time = START // MINUTE * MINUTE + 45_000
    limiter.record_usage(4_499, venue_time)
    await limiter.acquire(1)
    limiter.record_usage(4_500, venue_time)
    with pytest.raises(SourceError) as raised:
        await limiter.acquire(1)
    assert raised.value.retry_after == pytest.approx(15)


@pytest.mark.virtual_time
async def test_clock_set_back_does_not_change_available_weight() -> None:
    clock = ManualClock(START)
    limiter = WeightLimiter(600, 0.5, clock)
    clock._now -= 3_600_000
    async with asyncio.timeout(1):
        await limiter.acquire(25)
    waiting = asyncio.create_task(limiter.acquire(5))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    clock.advance(clock.now() + 1_002)
    await waiting


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("7", 7), ("0", 1), (None, 60), ("soon", 60), ("-5", 60), ("nan", 60), ("99999999", 259_200)],
)
def test_retry_after_is_parsed_and_bounded(text: str | None, seconds: float) -> None:
    assert parse_retry_after(text) == seconds
