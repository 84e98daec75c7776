"""Records on their way through one connection: many at once, each answered for itself."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kronos_connectors.mqtt.link import Link
from kronos_connectors.mqtt.reasons import Answer
from kronos_connectors.mqtt.suspects import Suspects
from kronos_stream.forecast.sink import Record, Refusal

_OVERHEAD, _PROPERTY_OVERHEAD = 32, 5
"""Bytes of a packet, and of a property in it, beyond their texts; at most."""


class Publication(NamedTuple):
    """What of a record goes to a topic."""

    record: Record
    topic: str
    payload: bytes
    retain: bool

    def size(self) -> int:
        """Bytes of the packet, at most."""
        headers = self.record.headers
        texts = [self.topic.encode(), self.payload, *(value for _, value in headers)]
        names = sum(_PROPERTY_OVERHEAD + len(name) for name, _ in headers)
        return _OVERHEAD + names + sum(map(len, texts))


class Sending:
    """One delivery. An answer that is not yes stops it, and those under way are waited for."""

    def __init__(
        self, link: Link, suspects: Suspects, taken: Callable[[Publication], None]
    ) -> None:
        """taken: told each that the broker has accepted."""
        self.refusals: list[Refusal] = []
        """What the broker will never take."""
        self.postponed = ""
        """Why it did not take something that it may take another time; empty if there was none."""
        self._link, self._suspects, self._taken = link, suspects, taken
        self._under_way: deque[tuple[Publication, asyncio.Future[Answer | None]]] = deque()

    async def run(self, publications: Sequence[Publication]) -> None:
        """Send and hear of each. Raises LinkError where the link is lost."""
        for one in publications:
            alone = self._suspects.alone(one.record.sequence)
            await self._hear_until(0 if alone else self._link.window - 1)
            if self.postponed:
                break
            self._under_way.append((one, self._send(one)))
            if alone:
                await self._hear_until(0)
        await self._hear_until(0)

    async def _hear_until(self, most: int) -> None:
        """Hear answers until no more than ``most`` are awaited."""
        while len(self._under_way) > most:
            one, answer = self._under_way[0]
            said = await answer
            if said is None:
                error = self._link.lost.result()
                if error.answer.over_a_message:
                    under_way = [sent.record.sequence for sent, _ in self._under_way]
                    self._suspects.hung_up(under_way, f"the broker hung up over it: {error}")
                raise error
            self._under_way.popleft()
            self._judge(one, said)

    def _send(self, one: Publication) -> asyncio.Future[Answer | None]:
        """CloudEvents' attributes go as MQTT 5 has them: without prefix, the content type apart."""
        headers = {name: value.decode() for name, value in one.record.headers}
        content_type = headers.pop("content-type", "application/json")
        return self._link.send(
            one.topic,
            one.payload,
            retain=one.retain,
            content_type=content_type,
            attributes=[(name.removeprefix("ce_"), value) for name, value in headers.items()],
        )

    def _judge(self, one: Publication, said: Answer) -> None:
        if said.verdict == "taken":
            self._taken(one)
        elif said.verdict == "refused":
            self.refusals.append(Refusal(one.record, f"refused by the broker: {said}"))
        else:
            self.postponed = self.postponed or f"{one.topic}: {said}"
