"""The outbox: messages are safe before anyone hears of them, and go out until they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import inf, isinf
from random import Random
from typing import NamedTuple

import structlog

from kronos_stream.daemon.delivery import Delivery
from kronos_stream.daemon.due import Outcome
from kronos_stream.daemon.metrics import Metrics
from kronos_stream.daemon.state import Draft, Passed, State
from kronos_stream.forecast.sink import RecordKind, Refusal, Sink
from kronos_stream.market.clock import Clock

_log = structlog.get_logger()


class Message(NamedTuple):
    """What every sink shall get."""

    kind: RecordKind
    key: str
    value: bytes
    headers: tuple[tuple[str, bytes], ...]
    received: int | None = None
    """When the bar it is about arrived, UTC ms by the wall clock, for the latency."""


class Outbox:
    """Between what was forecast and the sinks. ``publish`` at any time; ``run`` once.

    Every sink has a row of its own for each message and a task of its own, so that a slow or dead
    one holds up no other.
    """

    def __init__(
        self,
        state: State,
        sinks: Sequence[Sink],
        wall: Clock,
        random: Random,
        metrics: Metrics,
        *,
        max_age_seconds: float,
        bury: Callable[[str, Refusal], Message],
        patient: bool = True,
    ) -> None:
        """max_age_seconds: what waits longer is given up. bury: the dead letter, by sink.

        patient: whether a sink is tried again that does not let us in from the start.
        """
        self._state, self._wall, self._bury = state, wall, bury
        self._max_age = round(1000 * max_age_seconds)
        self._newest = 0
        order = self._order = asyncio.Lock()
        self._deliveries = {
            sink.name: Delivery(
                sink,
                state,
                wall,
                random,
                metrics,
                max_age=self._max_age,
                letter=self._letter,
                order=order,
                patient=patient,
            )
            for sink in sinks
        }

    async def publish(
        self,
        outcomes: Sequence[Outcome],
        messages: Sequence[Message],
        passed: Sequence[Passed] = (),
    ) -> None:
        """Record outcomes and messages, all or none; they are safe when this returns.

        passed: bars that the messages are of, saved with them.
        """
        drafts = [self._draft(sink, one) for one in messages for sink in self._deliveries]
        received = [message.received for message in messages for _ in self._deliveries]
        async with self._order:
            try:
                records = await self._state.record(outcomes, drafts, passed)
            except BaseException:  # cancelled, they may be in the file nevertheless
                for delivery in self._deliveries.values():
                    delivery.look()
                raise
            for (sink, record), arrived in zip(records, received, strict=True):
                self._deliveries[sink].offer(record, arrived)
                self._newest = record.sequence

    @property
    def newest(self) -> int:
        """Sequence of the last record that was put in."""
        return self._newest

    @property
    def through(self) -> float:
        """Every sink has taken or refused all records up to this sequence; infinite if all."""
        return min((one.first for one in self._deliveries.values()), default=inf) - 1

    async def run(self) -> None:
        """Deliver until cancelled; the sinks are closed then. Raises StateError, SinkRefused."""
        backlogs = await self._state.backlogs()
        async with asyncio.TaskGroup() as tasks:
            for delivery in self._deliveries.values():
                tasks.create_task(delivery.run())
            for sink in backlogs.keys() - self._deliveries.keys():
                await self._forsake(sink, backlogs[sink].records)

    async def drain(self, seconds: float) -> int:
        """Wait for delivery, no longer than that: how many records are still undelivered."""
        with suppress(TimeoutError):
            async with asyncio.timeout(None if isinf(seconds) else seconds):
                for delivery in self._deliveries.values():
                    await delivery.idle.wait()
        return sum(delivery.waiting for delivery in self._deliveries.values())

    @property
    def deliveries(self) -> Mapping[str, Delivery]:
        """By sink, for whoever looks."""
        return self._deliveries

    def healthy(self) -> dict[str, str]:
        """By sink: why it does not deliver; empty if it does."""
        return {name: one.trouble or one.lateness() for name, one in self._deliveries.items()}

    async def _forsake(self, sink: str, records: int) -> None:
        """Records of a sink that is not set up wait for its return, until they are too old."""
        before = self._wall.now() - self._max_age
        given_up = 0
        while (count := (await self._state.expire(sink, before))[0]) > 0:
            given_up += count
        _log.warning(
            "records wait for a sink that is not set up",
            sink=sink,
            records=records - given_up,
            given_up=given_up,
        )

    def _draft(self, sink: str, message: Message) -> Draft:
        kind, key, value, headers, _ = message
        return Draft(sink, kind, key, value, headers, self._wall.now())

    def _letter(self, sink: str, refusal: Refusal) -> Draft:
        return self._draft(sink, self._bury(sink, refusal))
