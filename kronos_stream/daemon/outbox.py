"""The outbox: records are safe before anyone hears of them, and go out in order until they arrive.

Every sink has a lane of its own, so that a slow or dead one holds up no other. A lane holds the
newest records in memory, within bounds; while its sink lags behind, it reads them back from the
state file.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random
from typing import NamedTuple

import structlog

from kronos_stream.daemon.due import Outcome
from kronos_stream.daemon.metrics import Metrics
from kronos_stream.daemon.state import Draft, State
from kronos_stream.forecast.sink import Kind, Record, Refusal, Sink, SinkUnavailable
from kronos_stream.market.clock import Clock

_log = structlog.get_logger()

_BATCH_RECORDS, _BATCH_BYTES = 500, 4 * 2**20
_LANE_RECORDS, _LANE_BYTES = 2_000, 16 * 2**20
_DELIVER_SECONDS = 60.0
_CLOSE_SECONDS = 5.0
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 15.0


class Message(NamedTuple):
    """What every sink shall get."""

    kind: Kind
    key: str
    value: bytes
    headers: tuple[tuple[str, bytes], ...]
    received: int | None = None
    """When the bar it is about arrived, UTC ms by the wall clock, for the latency."""


class Outbox:
    """Between what was forecast and the sinks. ``publish`` at any time; ``run`` once."""

    def __init__(
        self,
        state: State,
        sinks: Sequence[Sink],
        wall: Clock,
        random: Random,
        metrics: Metrics,
        *,
        max_age_seconds: float,
        bury: Callable[[Refusal], Message],
    ) -> None:
        """bury: the dead letter of a record that a sink refuses."""
        self._state, self._wall = state, wall
        self._lanes = {
            sink.name: _Lane(sink, state, wall, random, metrics, max_age_seconds, bury)
            for sink in sinks
        }

    async def publish(self, outcomes: Sequence[Outcome], messages: Sequence[Message]) -> None:
        """Record outcomes and messages, all or none; they are safe when this returns."""
        created = self._wall.now()
        drafts = [
            Draft(sink, message.kind, message.key, message.value, message.headers, created)
            for message in messages
            for sink in self._lanes
        ]
        received = [message.received for message in messages for _ in self._lanes]
        records = await self._state.record(outcomes, drafts)
        for (sink, record), arrived in zip(records, received, strict=True):
            self._lanes[sink].offer(record, arrived)

    async def run(self) -> None:
        """Deliver until cancelled; the sinks are closed then."""
        async with asyncio.TaskGroup() as tasks:
            for lane in self._lanes.values():
                tasks.create_task(lane.run())

    async def drain(self, seconds: float) -> int:
        """Wait for delivery, no longer than that: how many records are still undelivered."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(lane.empty.wait() for lane in self._lanes.values()))
        return await self._state.waiting()

    def healthy(self) -> dict[str, str]:
        """By sink: why it does not deliver; empty if it does."""
        return {name: lane.trouble for name, lane in self._lanes.items()}


class _Lane:
    """One sink's records, in order."""

    def __init__(
        self,
        sink: Sink,
        state: State,
        wall: Clock,
        random: Random,
        metrics: Metrics,
        max_age_seconds: float,
        bury: Callable[[Refusal], Message],
    ) -> None:
        self._sink, self._state, self._wall, self._random = sink, state, wall, random
        self._metrics, self._max_age, self._bury = metrics, max_age_seconds, bury
        self._fresh: deque[Record] = deque()
        self._bytes = 0
        self._received: dict[int, int] = {}
        self._behind = True
        """Whether there are records in the state file that are not in memory."""
        self._taken = self._newest = 0
        self._news = asyncio.Event()
        self.empty = asyncio.Event()
        """Set while nothing waits."""
        self.trouble = "not started yet"

    def offer(self, record: Record, received: int | None) -> None:
        """Take in a record that was just recorded."""
        if record.sequence <= self._taken:
            return  # read from the state file already
        in_order = record.sequence > self._newest
        self._newest = max(self._newest, record.sequence)
        self._bytes += len(record.value)
        if self._behind or not in_order or self._full():
            self._behind = True
            self._fresh.clear()
            self._received.clear()
            self._bytes = 0
        else:
            self._fresh.append(record)
            if received is not None:
                self._received[record.sequence] = received
        self.empty.clear()
        self._news.set()

    async def run(self) -> None:
        tries = 0
        try:
            await self._start()
            while True:
                batch = await self._next()
                while batch:
                    try:
                        batch = await self._deliver(batch)
                        tries = 0
                    except Exception as error:  # noqa: BLE001 - a sink may raise anything
                        self._failed(error, batch)
                        await asyncio.sleep(self._pause(tries))
                        tries += 1
                        batch = await self._expire(batch)
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self._sink.close()

    async def _start(self) -> None:
        """Make the sink ready, for as long as it takes; what is published meanwhile waits."""
        tries = 0
        while True:
            try:
                async with asyncio.timeout(_DELIVER_SECONDS):
                    await self._sink.start()
            except Exception as error:  # noqa: BLE001 - a sink may raise anything
                self._failed(error, [])
                await asyncio.sleep(self._pause(tries))
                tries += 1
            else:
                self.trouble = ""
                return

    async def _next(self) -> list[Record]:
        """The next records, once there are any."""
        while True:
            self._news.clear()
            if self._behind:
                batch = await self._state.undelivered(self._sink.name, self._taken, _BATCH_RECORDS)
                last = batch[-1].sequence if batch else self._taken
                self._behind = len(batch) == _BATCH_RECORDS or last < self._newest
            else:
                batch = self._from_memory()
            batch = await self._expire(batch)
            if batch:
                self._taken = batch[-1].sequence
                return batch
            if not self._behind:
                self.empty.set()
                await self._news.wait()

    def _from_memory(self) -> list[Record]:
        batch: list[Record] = []
        size = 0
        while self._fresh and len(batch) < _BATCH_RECORDS and size < _BATCH_BYTES:
            record = self._fresh.popleft()
            size += len(record.value)
            batch.append(record)
        self._bytes -= size
        return batch

    async def _deliver(self, batch: list[Record]) -> list[Record]:
        """Give ``batch`` to the sink; empty when all is done with."""
        async with asyncio.timeout(_DELIVER_SECONDS):
            refusals = await self._sink.deliver(batch)
        if self.trouble:
            _log.info("sink delivers", sink=self._sink.name)
            self.trouble = ""
        now = self._wall.now()
        for refusal in refusals:
            await self._refused(refusal)
        refused = {refusal.record.sequence for refusal in refusals}
        for record in batch:
            received = self._received.pop(record.sequence, None)
            if record.sequence not in refused:
                self._metrics.delivered.labels(self._sink.name, record.kind).inc()
                if received is not None:
                    latency = self._metrics.published.labels(self._sink.name)
                    latency.observe(max(0, now - received) / 1000)
        await self._state.delivered(self._sink.name, [record.sequence for record in batch])
        self._measure(None)
        return []

    async def _refused(self, refusal: Refusal) -> None:
        record, name = refusal.record, self._sink.name
        self._metrics.refused.labels(name).inc()
        _log.warning("record refused", sink=name, key=record.key, why=refusal.reason)
        if record.kind == "deadletter":
            return  # it would go round for ever
        letter = self._bury(refusal)
        draft = Draft(name, letter.kind, letter.key, letter.value, letter.headers, self._wall.now())
        for _, put in await self._state.record([], [draft]):
            self.offer(put, None)

    async def _expire(self, batch: list[Record]) -> list[Record]:
        """What of ``batch`` is not too old."""
        oldest = self._wall.now() - round(1000 * self._max_age)
        old = [record.sequence for record in batch if record.created < oldest]
        if not old:
            return batch
        self._metrics.expired.labels(self._sink.name).inc(len(old))
        _log.error(
            "records given up: undelivered for too long", sink=self._sink.name, number=len(old)
        )
        self._taken = max(self._taken, old[-1])
        await self._state.delivered(self._sink.name, old)
        return [record for record in batch if record.created >= oldest]

    def _failed(self, error: Exception, batch: list[Record]) -> None:
        self._metrics.sink_failures.labels(self._sink.name).inc()
        self._measure(batch)
        why = str(error) or type(error).__name__
        if not isinstance(error, (SinkUnavailable, TimeoutError)):
            _log.error("sink failed unexpectedly", sink=self._sink.name, exc_info=error)
        elif why != self.trouble:
            _log.warning("sink does not deliver; trying again", sink=self._sink.name, why=why)
        self.trouble = why

    def _measure(self, batch: list[Record] | None) -> None:
        age = 0.0 if not batch else (self._wall.now() - batch[0].created) / 1000
        self._metrics.outbox_age.labels(self._sink.name).set(max(0.0, age))
        waiting = self._newest - self._taken + (len(batch) if batch else 0)
        self._metrics.queued.labels(f"outbox:{self._sink.name}").set(max(0, waiting))

    def _pause(self, tries: int) -> float:
        most = min(_SHORTEST_PAUSE_SECONDS * 2 ** min(tries, 10), _LONGEST_PAUSE_SECONDS)
        return float(most * (0.5 + self._random.random() / 2))

    def _full(self) -> bool:
        return len(self._fresh) >= _LANE_RECORDS or self._bytes > _LANE_BYTES
