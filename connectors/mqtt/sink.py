"""Forecasts to MQTT: acknowledged by the broker, in order per series, the latest retained.

The connection stays open between deliveries, so that the status topic is right. On each new one the
latest forecast of every series is published again: a broker that was killed may have lost it, or
retain an older one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from random import Random

import aiomqtt

from kronos_connectors.mqtt.checks import checks
from kronos_connectors.mqtt.connection import Connection, MqttConnectionError
from kronos_connectors.mqtt.options import MqttOptions
from kronos_connectors.mqtt.poison import PoisonTracker
from kronos_connectors.mqtt.publisher import Publication, Publisher
from kronos_connectors.mqtt.reconnect import Reconnector
from kronos_connectors.mqtt.topics import invalid_reason
from kronos_stream.interfaces.diagnostics import Check
from kronos_stream.interfaces.sink import Record, Refusal, SinkLoginRefused, SinkUnavailable
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_ONLINE, _OFFLINE = b"online", b"offline"

_REPUBLISH_BATCH = 500
"""Number of latest forecasts to publish within one deadline."""

_CLOSE_TIMEOUT_SECONDS = 1.0


class MqttSink:
    """Sink with one connection at a time, which is replaced after any failure."""

    name = "mqtt"

    def __init__(self, options: MqttOptions, random: Random) -> None:
        self._options = options
        self._topic_for = options.forecast_template().for_series
        self._status_topic = options.status()
        self._reconnector = Reconnector(self._create_connection, options.address, random)
        self._reconnect_task: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        """The connection, once the status and the latest forecasts are published."""
        self._ready = asyncio.Event()
        self._latest: dict[str, Publication] = {}
        """The last acknowledged retained message by topic."""
        self._poison = PoisonTracker()

    def checks(self) -> Sequence[Check]:
        return checks(self._options)

    async def start(self) -> None:
        """Connect; after a failure, attempts continue in the background."""
        if self._reconnect_task is None:
            self._reconnect_task = asyncio.create_task(
                self._reconnector.run(self._serve, lambda _: None)
            )
        options = self._options
        waits = [
            asyncio.ensure_future(one.wait()) for one in (self._ready, self._reconnector.failing)
        ]
        try:
            await asyncio.wait(
                (*waits, self._reconnect_task),
                timeout=options.connect_seconds + options.delivery_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for wait in waits:
                wait.cancel()
        self._get_connection()

    async def deliver(self, records: Sequence[Record]) -> Sequence[Refusal]:
        if self._reconnect_task is None:  # it failed unexpectedly, which was reported
            await self.start()
        connection = self._get_connection()
        accepted: list[Publication] = []
        refusals: list[Refusal] = []
        for record in records:
            found = self._publications(record)
            if isinstance(found, Refusal):
                refusals.append(found)
            elif (size := max(one.size() for one in found)) > connection.max_packet_size:
                reason = f"{size:,} bytes, over the limit of {connection.max_packet_size:,}"
                refusals.append(Refusal(record, reason))
            else:
                accepted += found
        refusals += await self._publish_with_deadline(connection, accepted)
        self._poison.discard([record.sequence for record in records])
        return sorted(refusals, key=lambda refusal: refusal.record.sequence)

    async def close(self) -> None:
        """Publish the status "offline" if connected, and disconnect."""
        connection, task = self._connection, self._reconnect_task
        self._connection = self._reconnect_task = None
        if connection is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_SECONDS):
                    await connection.publish_nowait(self._status_topic, _OFFLINE, retain=True)
        if task is not None:
            task.cancel()
            await asyncio.wait((task,), timeout=2 * _CLOSE_TIMEOUT_SECONDS)

    # -- the connection ----------------------------------------------------------------------

    def _create_connection(self) -> Connection:
        return Connection(
            self._options,
            f"{self._options.client_id}-sink",
            will=aiomqtt.Will(self._status_topic, _OFFLINE, qos=1, retain=True),
        )

    async def _serve(self, connection: Connection) -> None:
        """Publish the status and the latest forecasts, then serve deliveries until it is lost."""
        seconds = self._options.delivery_seconds
        try:
            async with asyncio.timeout(seconds):
                await self._publish_online(connection)
            latest = list(self._latest.values())
            for first in range(0, len(latest), _REPUBLISH_BATCH):
                async with asyncio.timeout(seconds):
                    # A refused one will be reported with the next record of its series.
                    await self._create_publisher(connection).run(
                        latest[first : first + _REPUBLISH_BATCH]
                    )
        except TimeoutError:
            raise MqttConnectionError(f"no acknowledgement in {seconds:g} s") from None
        self._reconnector.mark_ready()
        self._connection = connection
        self._ready.set()
        try:
            await asyncio.wait((connection.lost,))
            raise connection.lost.result()
        finally:
            self._connection = None
            self._ready.clear()

    async def _publish_online(self, connection: Connection) -> None:
        response = await connection.publish_nowait(self._status_topic, _ONLINE, retain=True)
        if response is None:
            raise connection.lost.result()
        if response.failed:
            raise MqttConnectionError(f"{self._status_topic}: {response}", response)

    def _get_connection(self) -> Connection:
        """The connection; raises SinkUnavailable if there is none."""
        if self._reconnect_task is not None and self._reconnect_task.done():
            task, self._reconnect_task = self._reconnect_task, None
            task.result()  # raises the unexpected error that ended it
        if self._connection is None or self._connection.lost.done():
            error = self._unavailable(self._reconnector.problem or "connection lost")
            raise SinkLoginRefused(str(error)) if self._reconnector.permanent else error
        return self._connection

    def _unavailable(self, reason: object) -> SinkUnavailable:
        return SinkUnavailable(f"{self._options.address}: {reason}")

    # -- records -----------------------------------------------------------------------------

    async def _publish_with_deadline(
        self, connection: Connection, publications: Sequence[Publication]
    ) -> Sequence[Refusal]:
        """Publish within the deadline; close the connection if that fails or is cancelled."""
        seconds = self._options.delivery_seconds
        publisher = self._create_publisher(connection)
        try:
            async with asyncio.timeout(seconds):
                await publisher.run(publications)
        except MqttConnectionError as error:
            raise self._unavailable(error) from None
        except TimeoutError:
            reason = f"no acknowledgement in {seconds:g} s"
            connection.abort(reason)
            raise self._unavailable(reason) from None
        except BaseException:
            connection.abort("delivery cancelled")
            raise
        if publisher.retry_reason:
            raise self._unavailable(publisher.retry_reason)
        return publisher.refusals

    def _create_publisher(self, connection: Connection) -> Publisher:
        return Publisher(connection, self._poison, self._remember_latest)

    def _remember_latest(self, publication: Publication) -> None:
        if publication.retain:
            self._latest[publication.topic] = publication

    def _publications(self, record: Record) -> list[Publication] | Refusal:
        """Messages of a record, or the reason why no broker would accept them."""
        if reason := self._poison.poison_reason(record.sequence):
            return Refusal(record, reason)
        if record.kind == "deadletter":
            topic = self._options.deadletter_topic
            return [Publication(record, topic, record.value, retain=False)]
        try:
            topic = self._topic_for(Series.parse(record.key))
        except ValueError as error:
            return Refusal(record, str(error))
        if reason := invalid_reason(topic):
            return Refusal(record, reason)
        if record.kind == "forecast":
            return [Publication(record, topic, record.value, retain=True)]
        # An empty message deletes the retained one.
        return [
            Publication(record, topic, record.value, retain=False),
            Publication(record, topic, b"", retain=True),
        ]


def build_sink(options: MqttOptions, _clock: Clock, random: Random) -> MqttSink:
    """A sink; it connects at its start."""
    return MqttSink(options, random)
