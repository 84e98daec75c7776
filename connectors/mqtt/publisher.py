"""Records on their way through one connection: many at once, each answered for itself."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kronos_connectors.mqtt.connection import Connection
from kronos_connectors.mqtt.poison import PoisonTracker
from kronos_connectors.mqtt.reason_codes import BrokerResponse
from kronos_stream.interfaces.sink import Record, Refusal

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


class Publisher:
    """One delivery. An answer that is not yes stops it, and those under way are waited for."""

    def __init__(
        self,
        connection: Connection,
        poison: PoisonTracker,
        on_accepted: Callable[[Publication], None],
    ) -> None:
        """taken: told each that the broker has accepted."""
        self.refusals: list[Refusal] = []
        """What the broker will never take."""
        self.retry_reason = ""
        """Why it did not take something that it may take another time; empty if there was none."""
        self._connection, self._poison, self._on_accepted = connection, poison, on_accepted
        self._inflight: deque[tuple[Publication, asyncio.Future[BrokerResponse | None]]] = deque()

    async def run(self, publications: Sequence[Publication]) -> None:
        """Send and hear of each. Raises LinkError where the link is lost."""
        for one in publications:
            alone = self._poison.is_suspect(one.record.sequence)
            await self._wait_until_inflight(0 if alone else self._connection.max_inflight - 1)
            if self.retry_reason:
                break
            self._inflight.append((one, self._send(one)))
            if alone:
                await self._wait_until_inflight(0)
        await self._wait_until_inflight(0)

    async def _wait_until_inflight(self, most: int) -> None:
        """Hear answers until no more than ``most`` are awaited."""
        while len(self._inflight) > most:
            one, answer = self._inflight[0]
            said = await answer
            if said is None:
                error = self._connection.lost.result()
                if error.response.caused_by_message:
                    under_way = [sent.record.sequence for sent, _ in self._inflight]
                    self._poison.on_disconnected(under_way, f"the broker hung up over it: {error}")
                raise error
            self._inflight.popleft()
            self._handle_response(one, said)

    def _send(self, one: Publication) -> asyncio.Future[BrokerResponse | None]:
        """CloudEvents' attributes go as MQTT 5 has them: without prefix, the content type apart."""
        headers = {name: value.decode() for name, value in one.record.headers}
        content_type = headers.pop("content-type", "application/json")
        return self._connection.publish_nowait(
            one.topic,
            one.payload,
            retain=one.retain,
            content_type=content_type,
            user_properties=[(name.removeprefix("ce_"), value) for name, value in headers.items()],
        )

    def _handle_response(self, one: Publication, response: BrokerResponse) -> None:
        if response.publish_outcome == "taken":
            self._on_accepted(one)
        elif response.publish_outcome == "refused":
            self.refusals.append(Refusal(one.record, f"refused by the broker: {response}"))
        else:
            self.retry_reason = self.retry_reason or f"{one.topic}: {response}"
