"""Delivery of records over one connection, several at once, each acknowledged separately."""

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
"""Maximum bytes of a packet, and of a property, beside their content."""


class Publication(NamedTuple):
    """A message to publish for a record."""

    record: Record
    topic: str
    payload: bytes
    retain: bool

    def size(self) -> int:
        """Maximum bytes of the packet."""
        headers = self.record.headers
        texts = [self.topic.encode(), self.payload, *(value for _, value in headers)]
        names = sum(_PROPERTY_OVERHEAD + len(name) for name, _ in headers)
        return _OVERHEAD + names + sum(map(len, texts))


class Publisher:
    """One delivery. It stops at the first message to be retried, and waits for pending ones."""

    def __init__(
        self,
        connection: Connection,
        poison: PoisonTracker,
        on_accepted: Callable[[Publication], None],
    ) -> None:
        """on_accepted: called for each message that the broker has accepted."""
        self.refusals: list[Refusal] = []
        """Records that the broker will never accept."""
        self.retry_reason = ""
        """Why a message must be sent again later; empty if none."""
        self._connection, self._poison, self._on_accepted = connection, poison, on_accepted
        self._inflight: deque[tuple[Publication, asyncio.Future[BrokerResponse | None]]] = deque()

    async def run(self, publications: Sequence[Publication]) -> None:
        """Publish all, and wait for the responses. Raises MqttConnectionError."""
        for publication in publications:
            alone = self._poison.is_suspect(publication.record.sequence)
            await self._wait_until_inflight(0 if alone else self._connection.max_inflight - 1)
            if self.retry_reason:
                break
            self._inflight.append((publication, self._send(publication)))
            if alone:
                await self._wait_until_inflight(0)
        await self._wait_until_inflight(0)

    async def _wait_until_inflight(self, most: int) -> None:
        """Wait until at most ``most`` messages are unacknowledged."""
        while len(self._inflight) > most:
            publication, acknowledged = self._inflight[0]
            response = await acknowledged
            if response is None:
                error = self._connection.lost.result()
                if error.response.caused_by_message:
                    pending = [sent.record.sequence for sent, _ in self._inflight]
                    reason = f"the broker closed the connection because of it: {error}"
                    self._poison.on_disconnected(pending, reason)
                raise error
            self._inflight.popleft()
            self._handle_response(publication, response)

    def _send(self, publication: Publication) -> asyncio.Future[BrokerResponse | None]:
        """Publish with the binding of CloudEvents to MQTT 5: attributes without a prefix."""
        headers = {name: value.decode() for name, value in publication.record.headers}
        content_type = headers.pop("content-type", "application/json")
        return self._connection.publish_nowait(
            publication.topic,
            publication.payload,
            retain=publication.retain,
            content_type=content_type,
            user_properties=[(name.removeprefix("ce_"), value) for name, value in headers.items()],
        )

    def _handle_response(self, publication: Publication, response: BrokerResponse) -> None:
        if response.publish_outcome == "accepted":
            self._on_accepted(publication)
        elif response.publish_outcome == "rejected":
            self.refusals.append(Refusal(publication.record, f"refused by the broker: {response}"))
        else:
            self.retry_reason = self.retry_reason or f"{publication.topic}: {response}"
