"""Throughput of the intake on one core: kline frames decoded, sequenced and saved."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from time import process_time

import click
import orjson

from kronos_connectors.binance.connection import Connection
from kronos_connectors.binance.frames import Kline
from kronos_connectors.binance.pool import ConnectionPool
from kronos_stream.daemon.intake.pipeline import IntakePipeline
from kronos_stream.daemon.intake.saved_bars import SavedBars
from kronos_stream.daemon.storage.state import State
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.source import SourceCallbacks, Traits
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.clock import ManualClock
from kronos_stream.market.series import Series

_SERIES = 200
_LOOKBACK = 96
_MINUTE_MS = 60_000
_PUSH_MS = 2_000
_START_MS = 1_750_000_020_000


@dataclass(frozen=True, slots=True)
class IngestRates:
    """Frames per second of CPU time, for one-minute bars that are pushed every two seconds."""

    series: int
    frames: int
    decoded: float
    """Decoding from bytes to candles."""
    taken_in: float
    """Decoding and sequencing: all that the event loop does per frame."""
    saved: float
    """As ``taken_in``, and closed bars saved to the state file and appended to their contexts."""
    floor: float
    """JSON parsing only."""


def run(*, as_json: bool) -> None:
    """Measure and print."""
    measured = measure()
    if as_json:
        click.echo(json.dumps(asdict(measured)))
        return
    for label, rate in (
        ("JSON parsing only (the floor)", measured.floor),
        ("decoded", measured.decoded),
        ("decoded and sequenced", measured.taken_in),
        ("decoded, sequenced, closed bars saved", measured.saved),
    ):
        click.echo(f"{rate:10,.0f} kline frames per second and core: {label}")


def measure(seconds: float = 3.0) -> IngestRates:
    """Process frames for about ``seconds`` of CPU time, without that for generating them."""
    return asyncio.run(_measure(seconds))


async def _measure(seconds: float) -> IngestRates:
    series = {
        (f"SIM{n:03}USDT", "1m"): Series.parse(f"binance:SIM{n:03}/USDT:1m") for n in range(_SERIES)
    }
    clock = ManualClock(_START_MS)
    with tempfile.TemporaryDirectory(prefix="kronos-bench-") as folder:
        state = await State.open(Path(folder) / "state.sqlite")
        metrics = Metrics()
        pipeline = IntakePipeline(
            {"binance": _FlatSource()},
            SavedBars(state, clock, metrics, lookback=_LOOKBACK),
            lambda _: None,
            clock,
            Random(0),
            metrics,
            catch_up="newest",
            dead_letter=lambda *what: None,  # noqa: ARG005
        )
        await pipeline.follow(series.values())
        running = asyncio.create_task(pipeline.run())
        try:
            await pipeline.drain()
            return await _measure_intake(pipeline, clock, series, seconds)
        finally:
            running.cancel()
            await asyncio.wait((running,))
            await state.close()


async def _measure_intake(
    pipeline: IntakePipeline,
    clock: ManualClock,
    series: Mapping[tuple[str, str], Series],
    seconds: float,
) -> IngestRates:
    pool = ConnectionPool(Random(0), capacity=_SERIES, stall_seconds=10, lifetime_seconds=3_600)
    pool.follow(series)
    connection = Connection(stall_seconds=10, lifetime_seconds=3_600)
    callbacks = pipeline.callbacks("binance")
    frames, parsed, decoded, taken_in, saved = 0, 0.0, 0.0, 0.0, 0.0
    opened = _START_MS
    while parsed + decoded + taken_in + saved < seconds:
        for event in range(opened + _PUSH_MS, opened + _MINUTE_MS + 1, _PUSH_MS):
            clock.advance(event)
            batch = list(_frames(series, opened, event))
            times = [process_time()]
            for frame in batch:
                orjson.loads(frame)
            times.append(process_time())
            for frame in batch:
                pool.receive(connection, frame, 0.0)
            times.append(process_time())
            _receive(pool, connection, callbacks, clock, batch)
            times.append(process_time())
            await pipeline.drain()
            times.append(process_time())
            frames += len(batch)
            parsed += times[1] - times[0]
            decoded += times[2] - times[1]
            taken_in += times[3] - times[2]
            saved += times[4] - times[2]
        opened += _MINUTE_MS
    return IngestRates(
        _SERIES, frames, frames / decoded, frames / taken_in, frames / saved, frames / parsed
    )


def _receive(
    pool: ConnectionPool,
    connection: Connection,
    callbacks: SourceCallbacks,
    clock: ManualClock,
    frames: list[bytes],
) -> None:
    """Pass frames on as the connector does."""
    receive, update, now = pool.receive, callbacks.update, clock.now
    for frame in frames:
        decoded = receive(connection, frame, 0.0)
        if isinstance(decoded, Kline):
            update(Update(decoded.series, decoded.candle, decoded.closed, now()))


def _frames(series: Mapping[tuple[str, str], Series], opened: int, event: int) -> Iterator[bytes]:
    """Frames of the bar that opened at ``opened``, pushed at ``event``; the last is closed."""
    closed = b"true" if event == opened + _MINUTE_MS else b"false"
    price = 43_000 + event % 977 / 100
    for symbol, interval in series:
        name = symbol.encode()
        yield (
            b'{"stream":"%s@kline_%s","data":{"e":"kline","E":%d,"s":"%s","k":{"t":%d,"T":%d,'
            b'"s":"%s","i":"%s","f":4182,"L":4390,"o":"43000.00000000","c":"%.8f",'
            b'"h":"43010.00000000","l":"42990.00000000","v":"12.58310000","n":208,"x":%s,'
            b'"q":"541073.30000000","V":"6.29155000","Q":"270536.65000000","B":"0"}}}'
        ) % (
            name.lower(), interval.encode(), event, name, opened, opened + _MINUTE_MS - 1,
            name, interval.encode(), price, closed,
        )  # fmt: skip


class _FlatSource:
    """A source whose history is flat, to fill the contexts."""

    venue = "binance"
    traits = Traits()

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:  # noqa: ARG002
        return {}

    def subscribe(self, series: Collection[Series]) -> None: ...

    async def run(self, callbacks: SourceCallbacks) -> None: ...

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        first = series.timeframe.after(start - 1 - (start - 1) % _MINUTE_MS)
        return [
            Candle(opened, 43_000.0, 43_000.0, 43_000.0, 43_000.0, 1.0, 43_000.0)
            for opened in range(first, end - _MINUTE_MS + 1, _MINUTE_MS)
        ]

    async def close(self) -> None: ...
