"""Candles from MQTT: one topic per series, QoS 1, in a session that outlives the connection.

What arrives is acknowledged once the daemon has it, so what a broker holds for us while we are
away comes when we are back. There is no other history than what has been brought lately.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from random import Random

import structlog

from kronos_connectors.mqtt.keeper import Keeper
from kronos_connectors.mqtt.link import Link, LinkError
from kronos_connectors.mqtt.options import MqttOptions
from kronos_connectors.mqtt.subscriptions import Subscribe, Subscriptions
from kronos_connectors.mqtt.topics import fault
from kronos_connectors.shelf import Shelf
from kronos_stream.market.candle import Candle
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series
from kronos_stream.market.source import SourceCallbacks, LoginRefused, SourceError, Traits
from kronos_stream.market.wire import CandleMessageError, decode_update

_log = structlog.get_logger()

_ASK_AGAIN_SECONDS = 60.0
"""Until a subscription is asked for again that was refused."""

_MOST_KEPT = 4_096
"""Bytes of a message that cannot be, for those who look into it."""


class MqttSource:
    """A venue whose bars others publish, closed ones and, if they like, those still open."""

    # Silence says nothing about a market here: who publishes may be away. So no bar is made up
    # for it, unless later ones show that it will not come.
    traits = Traits(fills_empty=True)

    def __init__(self, venue: str, options: MqttOptions, clock: Clock, random: Random) -> None:
        self.venue = venue
        self._options, self._clock = options, clock
        self._topic = options.candles().of
        self._series: dict[str, Series] = {}
        self._subscriptions = Subscriptions()
        self._shelf = Shelf(options.history_bars)
        self._keeper = Keeper(self._link, options.address, random)
        self._intake: SourceCallbacks | None = None
        self._news = asyncio.Event()

    async def unknown(self, series: Collection[Series]) -> Mapping[Series, str]:
        """Those that cannot be topics and, before the start, those that we may not subscribe to."""
        topics = {self._topic(one): one for one in series}
        found = {one: why for topic, one in topics.items() if (why := fault(topic)) is not None}
        if self._intake is None:
            refused = await self._probe(topic for topic, one in topics.items() if one not in found)
            found |= {topics[topic]: f"{topic}: {why}" for topic, why in refused.items()}
        return found

    def follow(self, series: Collection[Series]) -> None:
        self._series = {self._topic(one): one for one in series}
        self._subscriptions.want(self._series)
        self._shelf.keep(series)
        self._news.set()

    async def run(self, intake: SourceCallbacks) -> None:
        """Until cancelled. A login that is refused by now may be granted again: it goes on."""
        self._intake = intake
        try:
            await self._keeper.run(self._serve, intake.count_event)
        finally:
            self._intake = None

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        if self._keeper.trouble:
            # What is missing may wait for us there.
            raise SourceError(f"{self._options.address}: {self._keeper.trouble}")
        now, after = self._clock.now(), series.timeframe.after
        return [bar for bar in self._shelf.between(series, start, end) if after(bar.time) <= now]

    async def close(self) -> None:
        """Whoever ends ``run`` has ended the connection."""

    async def _probe(self, topics: Iterable[str]) -> Mapping[str, str]:
        """Log in and subscribe, under a name of its own: which topics are refused, and why."""
        options, trial = self._options, Subscriptions()
        trial.want(list(topics))
        link = Link(options, f"{options.client_id}-{self.venue}-probe")
        try:
            await link.open()
            await _adjust(link, trial)
        except LinkError as error:
            kind = LoginRefused if error.refused else SourceError
            raise kind(f"{options.address}: {error}") from None
        finally:
            await link.close()
        return trial.refused

    def _link(self) -> Link:
        options = self._options
        return Link(
            options,
            f"{options.client_id}-{self.venue}",
            session_seconds=options.session_seconds,
            take=self._take,
        )

    async def _serve(self, link: Link) -> None:
        """Keep the subscriptions as they should be until the link is lost."""
        if self._options.session_seconds and not link.resumed:
            _log.info("no earlier session at mqtt broker", venue=self.venue)
        self._subscriptions.connected()
        await _adjust(link, self._subscriptions)
        self._keeper.works()
        while not link.lost.done():
            self._news.clear()
            await _adjust(link, self._subscriptions)
            await self._wait(link)
        raise link.lost.result()

    async def _wait(self, link: Link) -> None:
        """Until there is something to adjust, or the link is lost."""
        news = asyncio.ensure_future(self._news.wait())
        try:
            seconds = _ASK_AGAIN_SECONDS if self._subscriptions.refused else None
            done, _ = await asyncio.wait(
                (news, link.lost), timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            news.cancel()
        if not done:
            self._subscriptions.again()

    def _take(self, topic: str, payload: bytes) -> None:
        """Take in a message; it is acknowledged when this returns."""
        intake, series = self._intake, self._series.get(topic)
        if intake is None:
            return
        if series is None:
            self._subscriptions.arrived(topic)
            self._news.set()
            intake.count_event("not followed")
            return
        try:
            update = decode_update(payload, series, self._clock.now())
        except CandleMessageError as error:
            intake.reject(series, str(error), payload[:_MOST_KEPT])
            return
        # What opens only later would crowd out what is real.
        if (
            update.closed
            and update.candle.invalid_reason() is None
            and update.candle.time <= update.received
        ):
            self._shelf.put(series, update.candle)
        intake.update(update)


async def _adjust(link: Link, subscriptions: Subscriptions) -> None:
    """Ask the broker for what is wanted until it is so. Raises LinkError."""
    while request := subscriptions.request():
        topics = request.topics
        if not isinstance(request, Subscribe):
            await link.unfollow(topics)
            subscriptions.ended(topics)
            continue
        refused = await link.follow(topics)
        subscriptions.granted(set(topics) - refused.keys())
        subscriptions.refused |= refused
        for topic, why in refused.items():
            _log.warning("mqtt subscription refused", topic=topic, why=why)


def build_source(venue: str, options: MqttOptions, clock: Clock, random: Random) -> MqttSource:
    """A source; it connects when it is asked what is unknown, and when it runs."""
    return MqttSource(venue, options, clock, random)
