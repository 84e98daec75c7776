"""Candles from MQTT: one topic per series, QoS 1, in a session that outlives the connection.

Messages are acknowledged once the daemon has them, and the broker keeps those that arrive while the
daemon is disconnected. The history consists of the bars received so far.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from random import Random

import structlog

from kronos_connectors._shared.bar_cache import RecentBars
from kronos_connectors.mqtt.connection import Connection, MqttConnectionError
from kronos_connectors.mqtt.options import MqttOptions
from kronos_connectors.mqtt.reconnect import Reconnector
from kronos_connectors.mqtt.subscriptions import Subscribe, Subscriptions
from kronos_connectors.mqtt.topics import invalid_reason
from kronos_stream.interfaces.source import (
    MAX_REJECTED_BYTES,
    LoginRefused,
    SourceCallbacks,
    SourceError,
    Traits,
)
from kronos_stream.market.candle import Candle
from kronos_stream.market.candle_message import CandleMessageError, decode_update
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_log = structlog.get_logger()

_RESUBSCRIBE_SECONDS = 60.0
"""Delay until a refused subscription is requested again."""


class MqttSource:
    """A venue whose bars are published by others: closed bars, and optionally open ones."""

    # Silence means that the publisher is down, not that nothing trades.
    traits = Traits(fills_empty=True)

    def __init__(self, venue: str, options: MqttOptions, clock: Clock, random: Random) -> None:
        self.venue = venue
        self._options, self._clock = options, clock
        self._topic_for = options.candle_template().for_series
        self._series_by_topic: dict[str, Series] = {}
        self._subscriptions = Subscriptions()
        self._recent_bars = RecentBars(options.history_bars)
        self._reconnector = Reconnector(self._create_connection, options.address, random)
        self._callbacks: SourceCallbacks | None = None
        self._changed = asyncio.Event()

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:
        """Series without a valid topic and, before the start, with a refused subscription."""
        topics = {self._topic_for(one): one for one in series}
        found = {
            one: why for topic, one in topics.items() if (why := invalid_reason(topic)) is not None
        }
        if self._callbacks is None:
            refused = await self._probe(topic for topic, one in topics.items() if one not in found)
            found |= {topics[topic]: f"{topic}: {why}" for topic, why in refused.items()}
        return found

    def subscribe(self, series: Collection[Series]) -> None:
        self._series_by_topic = {self._topic_for(one): one for one in series}
        self._subscriptions.set_wanted(self._series_by_topic)
        self._recent_bars.retain(series)
        self._changed.set()

    async def run(self, callbacks: SourceCallbacks) -> None:
        self._callbacks = callbacks
        try:
            await self._reconnector.run(self._serve, callbacks.count_event)
        finally:
            self._callbacks = None

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        if self._reconnector.problem:
            # The session at the broker may have more bars.
            raise SourceError(f"{self._options.address}: {self._reconnector.problem}")
        now, after = self._clock.now(), series.timeframe.after
        return [
            bar for bar in self._recent_bars.between(series, start, end) if after(bar.time) <= now
        ]

    async def close(self) -> None:
        """Nothing to do: the end of :meth:`run` has closed the connection."""

    async def _probe(self, topics: Iterable[str]) -> Mapping[str, str]:
        """Log in and subscribe with another client id; returns refused topics and reasons."""
        options, subscriptions = self._options, Subscriptions()
        subscriptions.set_wanted(list(topics))
        connection = Connection(options, f"{options.client_id}-{self.venue}-probe")
        try:
            await connection.open()
            await _sync_subscriptions(connection, subscriptions)
        except MqttConnectionError as error:
            kind = LoginRefused if error.permanent else SourceError
            raise kind(f"{options.address}: {error}") from None
        finally:
            await connection.close()
        return subscriptions.refused

    def _create_connection(self) -> Connection:
        options = self._options
        return Connection(
            options,
            f"{options.client_id}-{self.venue}",
            session_seconds=options.session_seconds,
            on_message=self._on_message,
        )

    async def _serve(self, connection: Connection) -> None:
        """Update the subscriptions until the connection is lost."""
        if self._options.session_seconds and not connection.resumed:
            _log.info("no earlier session at mqtt broker", venue=self.venue)
        self._subscriptions.on_connected()
        await _sync_subscriptions(connection, self._subscriptions)
        self._reconnector.mark_ready()
        while not connection.lost.done():
            self._changed.clear()
            await _sync_subscriptions(connection, self._subscriptions)
            await self._wait_for_change(connection)
        raise connection.lost.result()

    async def _wait_for_change(self, connection: Connection) -> None:
        """Wait until subscriptions have to be changed, or the connection is lost."""
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            seconds = _RESUBSCRIBE_SECONDS if self._subscriptions.refused else None
            done, _ = await asyncio.wait(
                (changed, connection.lost), timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            changed.cancel()
        if not done:
            self._subscriptions.retry_refused()

    def _on_message(self, topic: str, payload: bytes) -> None:
        """Process a message; it is acknowledged when this returns."""
        callbacks, series = self._callbacks, self._series_by_topic.get(topic)
        if callbacks is None:
            return
        if series is None:
            self._subscriptions.on_message(topic)
            self._changed.set()
            callbacks.count_event("not followed")
            return
        try:
            update = decode_update(payload, series, self._clock.now())
        except CandleMessageError as error:
            callbacks.reject(series, str(error), payload[:MAX_REJECTED_BYTES])
            return
        # Invalid bars and bars of the future would displace real ones.
        if (
            update.closed
            and update.candle.invalid_reason() is None
            and update.candle.time <= update.received
        ):
            self._recent_bars.add(series, update.candle)
        callbacks.update(update)


async def _sync_subscriptions(connection: Connection, subscriptions: Subscriptions) -> None:
    """Subscribe and unsubscribe until nothing is left to do. Raises MqttConnectionError."""
    while request := subscriptions.next_request():
        topics = request.topics
        if not isinstance(request, Subscribe):
            await connection.unsubscribe_topics(topics)
            subscriptions.on_unsubscribed(topics)
            continue
        refused = await connection.subscribe_topics(topics)
        subscriptions.on_subscribed(set(topics) - refused.keys())
        subscriptions.refused |= refused
        for topic, why in refused.items():
            _log.warning("mqtt subscription refused", topic=topic, why=why)


def build_source(venue: str, options: MqttOptions, clock: Clock, random: Random) -> MqttSource:
    """A source; it connects in ``unsupported`` and ``run``."""
    return MqttSource(venue, options, clock, random)
