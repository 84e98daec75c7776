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
from kronos_connectors.mqtt.keeper import Keeper
from kronos_connectors.mqtt.link import Link, LinkError
from kronos_connectors.mqtt.options import MqttOptions
from kronos_connectors.mqtt.sending import Publication, Sending
from kronos_connectors.mqtt.suspects import Suspects
from kronos_connectors.mqtt.topics import fault
from kronos_stream.checkup import Check
from kronos_stream.forecast.sink import Record, Refusal, SinkLoginRefused, SinkUnavailable
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_ONLINE, _OFFLINE = b"online", b"offline"

_AT_ONCE = 500
"""Forecasts sent again within one deadline."""

_CLOSE_SECONDS = 1.0


class MqttSink:
    """One connection at a time, replaced whenever there is doubt about it."""

    name = "mqtt"

    def __init__(self, options: MqttOptions, random: Random) -> None:
        self._options = options
        self._topic, self._status = options.forecasts().of, options.status()
        self._keeper = Keeper(self._make_link, options.address, random)
        self._keeping: asyncio.Task[None] | None = None
        self._link: Link | None = None
        """The connection, once all is said on it that comes first."""
        self._ready = asyncio.Event()
        self._latest: dict[str, Publication] = {}
        """By topic: what the broker was given last to retain, and has taken."""
        self._suspects = Suspects()

    def checks(self) -> Sequence[Check]:
        return checks(self._options)

    async def start(self) -> None:
        """Connect; where that fails, it is tried on."""
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._keeper.run(self._serve, _uncounted))
        options = self._options
        waits = [asyncio.ensure_future(one.wait()) for one in (self._ready, self._keeper.failed)]
        try:
            await asyncio.wait(
                (*waits, self._keeping),
                timeout=options.connect_seconds + options.delivery_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for wait in waits:
                wait.cancel()
        self._there()

    async def deliver(self, records: Sequence[Record]) -> Sequence[Refusal]:
        if self._keeping is None:  # it ended by a mistake of ours, which was told
            await self.start()
        link = self._there()
        fit: list[Publication] = []
        refusals: list[Refusal] = []
        for record in records:
            found = self._publications(record)
            if isinstance(found, Refusal):
                refusals.append(found)
            elif (size := max(one.size() for one in found)) > link.most_bytes:
                why = f"{size:,} bytes, over the limit of {link.most_bytes:,}"
                refusals.append(Refusal(record, why))
            else:
                fit += found
        refusals += await self._bounded(link, fit)
        self._suspects.delivered([record.sequence for record in records])
        return sorted(refusals, key=lambda refusal: refusal.record.sequence)

    async def close(self) -> None:
        """Say that we are offline, if anyone hears it, and hang up."""
        link, keeping = self._link, self._keeping
        self._link = self._keeping = None
        if link is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await link.send(self._status, _OFFLINE, retain=True)
        if keeping is not None:
            keeping.cancel()
            await asyncio.wait((keeping,), timeout=2 * _CLOSE_SECONDS)

    # -- the connection ----------------------------------------------------------------------

    def _make_link(self) -> Link:
        return Link(
            self._options,
            f"{self._options.client_id}-sink",
            will=aiomqtt.Will(self._status, _OFFLINE, qos=1, retain=True),
        )

    async def _serve(self, link: Link) -> None:
        """Say what comes first, and let the link be used until it is lost."""
        seconds = self._options.delivery_seconds
        try:
            async with asyncio.timeout(seconds):
                await self._say_online(link)
            latest = list(self._latest.values())
            for first in range(0, len(latest), _AT_ONCE):
                async with asyncio.timeout(seconds):
                    # One that is refused now will be again, with the next record of its series.
                    await self._sending(link).run(latest[first : first + _AT_ONCE])
        except TimeoutError:
            raise LinkError(f"no acknowledgement in {seconds:g} s") from None
        self._keeper.works()
        self._link = link
        self._ready.set()
        try:
            await asyncio.wait((link.lost,))
            raise link.lost.result()
        finally:
            self._link = None
            self._ready.clear()

    async def _say_online(self, link: Link) -> None:
        answer = await link.send(self._status, _ONLINE, retain=True)
        if answer is None:
            raise link.lost.result()
        if answer.failed:
            raise LinkError(f"{self._status}: {answer}", answer)

    def _there(self) -> Link:
        """The connection, or SinkUnavailable."""
        if self._keeping is not None and self._keeping.done():
            keeping, self._keeping = self._keeping, None
            keeping.result()  # it ends by a mistake of ours alone, to be seen in full
        if self._link is None or self._link.lost.done():
            why = self._unavailable(self._keeper.trouble or "connection lost")
            raise SinkLoginRefused(str(why)) if self._keeper.refused else why
        return self._link

    def _unavailable(self, why: object) -> SinkUnavailable:
        return SinkUnavailable(f"{self._options.address}: {why}")

    # -- records -----------------------------------------------------------------------------

    async def _bounded(self, link: Link, publications: Sequence[Publication]) -> Sequence[Refusal]:
        """Send within the deadline; if that fails or is cancelled, the link goes with it."""
        seconds = self._options.delivery_seconds
        sending = self._sending(link)
        try:
            async with asyncio.timeout(seconds):
                await sending.run(publications)
        except LinkError as error:
            raise self._unavailable(error) from None
        except TimeoutError:
            why = f"no acknowledgement in {seconds:g} s"
            link.give_up(why)
            raise self._unavailable(why) from None
        except BaseException:
            link.give_up("a delivery was cut short")
            raise
        if sending.postponed:
            raise self._unavailable(sending.postponed)
        return sending.refusals

    def _sending(self, link: Link) -> Sending:
        return Sending(link, self._suspects, self._taken)

    def _taken(self, one: Publication) -> None:
        if one.retain:
            self._latest[one.topic] = one

    def _publications(self, record: Record) -> list[Publication] | Refusal:
        """What to publish of a record, or why no broker would ever take it."""
        if why := self._suspects.guilty(record.sequence):
            return Refusal(record, why)
        if record.kind == "deadletter":
            topic = self._options.deadletter_topic
            return [Publication(record, topic, record.value, retain=False)]
        try:
            topic = self._topic(Series.parse(record.key))
        except ValueError as error:
            return Refusal(record, str(error))
        if why := fault(topic):
            return Refusal(record, why)
        if record.kind == "forecast":
            return [Publication(record, topic, record.value, retain=True)]
        # An empty message takes away what is retained.
        return [
            Publication(record, topic, record.value, retain=False),
            Publication(record, topic, b"", retain=True),
        ]


def _uncounted(_: str) -> None:
    """What happens to a sink's connection is in its deliveries' metrics."""


def build_sink(options: MqttOptions, _clock: Clock, random: Random) -> MqttSink:
    """A sink; it connects at its start."""
    return MqttSink(options, random)
