"""Forecasts to MQTT: acknowledged by the broker, in order per series, the latest retained.

The connection is kept between deliveries, too, so that the status topic tells the truth. On each
new one the latest forecast of every series goes out again: a broker that was killed may have
forgotten it, or remember an older one.
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
"""Forecasts sent again within one deadline."""

_CLOSE_TIMEOUT_SECONDS = 1.0


class MqttSink:
    """One connection at a time, replaced whenever there is doubt about it."""

    name = "mqtt"

    def __init__(self, options: MqttOptions, random: Random) -> None:
        self._options = options
        self._topic_for, self._status_topic = (
            options.forecast_template().for_series,
            options.status(),
        )
        self._reconnector = Reconnector(self._create_connection, options.address, random)
        self._reconnect_task: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        """The connection, once all is said on it that comes first."""
        self._ready = asyncio.Event()
        self._latest: dict[str, Publication] = {}
        """By topic: what the broker was given last to retain, and has taken."""
        self._poison = PoisonTracker()

    def checks(self) -> Sequence[Check]:
        return checks(self._options)

    async def start(self) -> None:
        """Connect; where that fails, it is tried on."""
        if self._reconnect_task is None:
            self._reconnect_task = asyncio.create_task(
                self._reconnector.run(self._serve, _ignore_event)
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
        if self._reconnect_task is None:  # it ended by a mistake of ours, which was told
            await self.start()
        link = self._get_connection()
        fit: list[Publication] = []
        refusals: list[Refusal] = []
        for record in records:
            found = self._publications(record)
            if isinstance(found, Refusal):
                refusals.append(found)
            elif (size := max(one.size() for one in found)) > link.max_packet_size:
                why = f"{size:,} bytes, over the limit of {link.max_packet_size:,}"
                refusals.append(Refusal(record, why))
            else:
                fit += found
        refusals += await self._publish_with_deadline(link, fit)
        self._poison.discard([record.sequence for record in records])
        return sorted(refusals, key=lambda refusal: refusal.record.sequence)

    async def close(self) -> None:
        """Say that we are offline, if anyone hears it, and hang up."""
        link, keeping = self._connection, self._reconnect_task
        self._connection = self._reconnect_task = None
        if link is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_SECONDS):
                    await link.publish_nowait(self._status_topic, _OFFLINE, retain=True)
        if keeping is not None:
            keeping.cancel()
            await asyncio.wait((keeping,), timeout=2 * _CLOSE_TIMEOUT_SECONDS)

    # -- the connection ----------------------------------------------------------------------

    def _create_connection(self) -> Connection:
        return Connection(
            self._options,
            f"{self._options.client_id}-sink",
            will=aiomqtt.Will(self._status_topic, _OFFLINE, qos=1, retain=True),
        )

    async def _serve(self, connection: Connection) -> None:
        """Say what comes first, and let the link be used until it is lost."""
        seconds = self._options.delivery_seconds
        try:
            async with asyncio.timeout(seconds):
                await self._publish_online(connection)
            latest = list(self._latest.values())
            for first in range(0, len(latest), _REPUBLISH_BATCH):
                async with asyncio.timeout(seconds):
                    # One that is refused now will be again, with the next record of its series.
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
        answer = await connection.publish_nowait(self._status_topic, _ONLINE, retain=True)
        if answer is None:
            raise connection.lost.result()
        if answer.failed:
            raise MqttConnectionError(f"{self._status_topic}: {answer}", answer)

    def _get_connection(self) -> Connection:
        """The connection, or SinkUnavailable."""
        if self._reconnect_task is not None and self._reconnect_task.done():
            keeping, self._reconnect_task = self._reconnect_task, None
            keeping.result()  # it ends by a mistake of ours alone, to be seen in full
        if self._connection is None or self._connection.lost.done():
            why = self._unavailable(self._reconnector.problem or "connection lost")
            raise SinkLoginRefused(str(why)) if self._reconnector.permanent else why
        return self._connection

    def _unavailable(self, why: object) -> SinkUnavailable:
        return SinkUnavailable(f"{self._options.address}: {why}")

    # -- records -----------------------------------------------------------------------------

    async def _publish_with_deadline(
        self, connection: Connection, publications: Sequence[Publication]
    ) -> Sequence[Refusal]:
        """Send within the deadline; if that fails or is cancelled, the link goes with it."""
        seconds = self._options.delivery_seconds
        sending = self._create_publisher(connection)
        try:
            async with asyncio.timeout(seconds):
                await sending.run(publications)
        except MqttConnectionError as error:
            raise self._unavailable(error) from None
        except TimeoutError:
            why = f"no acknowledgement in {seconds:g} s"
            connection.abort(why)
            raise self._unavailable(why) from None
        except BaseException:
            connection.abort("a delivery was cut short")
            raise
        if sending.retry_reason:
            raise self._unavailable(sending.retry_reason)
        return sending.refusals

    def _create_publisher(self, connection: Connection) -> Publisher:
        return Publisher(connection, self._poison, self._remember_latest)

    def _remember_latest(self, one: Publication) -> None:
        if one.retain:
            self._latest[one.topic] = one

    def _publications(self, record: Record) -> list[Publication] | Refusal:
        """What to publish of a record, or why no broker would ever take it."""
        if why := self._poison.poison_reason(record.sequence):
            return Refusal(record, why)
        if record.kind == "deadletter":
            topic = self._options.deadletter_topic
            return [Publication(record, topic, record.value, retain=False)]
        try:
            topic = self._topic_for(Series.parse(record.key))
        except ValueError as error:
            return Refusal(record, str(error))
        if why := invalid_reason(topic):
            return Refusal(record, why)
        if record.kind == "forecast":
            return [Publication(record, topic, record.value, retain=True)]
        # An empty message takes away what is retained.
        return [
            Publication(record, topic, record.value, retain=False),
            Publication(record, topic, b"", retain=True),
        ]


def _ignore_event(_: str) -> None:
    """What happens to a sink's connection is in its deliveries' metrics."""


def build_sink(options: MqttOptions, _clock: Clock, random: Random) -> MqttSink:
    """A sink; it connects at its start."""
    return MqttSink(options, random)
