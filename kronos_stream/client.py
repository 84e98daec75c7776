"""Forecasts for trading bots, from Kafka: typed, each once, fresh.

::

    import asyncio
    from kronos_stream.client import forecasts

    async def main():
        async for forecast in forecasts("localhost:9092", symbols=["BTC/USDT"]):
            print(forecast.series, forecast.summary.p_up, forecast.close["q50"][-1])

    asyncio.run(main())

Needs no model and no GPU, and imports neither.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from datetime import datetime
from typing import Any, Literal

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from kronos_stream.forecast.message import REMOVAL, Forecast
from kronos_stream.market.clock import Clock, SystemClock
from kronos_stream.market.series import Series

__all__ = ["Forecast", "forecasts"]

_log = logging.getLogger(__name__)  # the standard library's: this runs in other people's programs

_REMOVAL = REMOVAL.encode()
_POLL_MS = 1_000
_POLL_RECORDS = 500
_COMMIT_SECONDS = 1.0
_RECONNECT_SECONDS = 1.0
_CLOSE_SECONDS = 5.0
_MAX_STREAMS = 100_000


async def forecasts(
    bootstrap: str,
    *,
    series: Collection[str] | None = None,
    symbols: Collection[str] | None = None,
    topic_prefix: str = "kronos",
    group: str | None = None,
    start: Literal["latest", "earliest"] | datetime = "latest",
    duplicates: bool = False,
    superseded: bool = False,
    expired: bool = False,
    clock: Clock | None = None,
    **consumer: Any,  # noqa: ANN401 - aiokafka's own
) -> AsyncGenerator[Forecast, None]:
    """Forecasts as they are published, in order per series, for as long as it is iterated.

    bootstrap: brokers as ``host:port``, more than one with commas.
    series, symbols: only these, such as ``binance:BTC/USDT:5m`` and ``BTC/USDT``; else all.
    group: name of a consumer group; its members share the series, and each goes on where the group
        was. What the loop's body has finished is committed, so a crash repeats some.
    start: where to begin if no group has: with what is new, with all there is, or (without group)
        with what was published from a time on.
    duplicates: also repeated records; delivery is at least once.
    superseded: also those of which a higher revision has already come.
    expired: also those whose ``valid_until`` has passed by ``clock``, by default the wall's.
    consumer: arguments for aiokafka's consumer: ``security_protocol``, ``ssl_context``,
        ``sasl_mechanism``, ``sasl_plain_username``, ``sasl_plain_password`` and so on.

    Brokers may come and go; raises aiokafka's KafkaConnectionError if none is there at first.
    Records that cannot be read are skipped with a warning.
    """
    if group is not None and isinstance(start, datetime):
        raise ValueError("a group begins where it was, or at latest or earliest: not at a time")
    reader = _Reader(
        f"{topic_prefix}.forecasts.v1",
        start,
        {"bootstrap_servers": bootstrap, "group_id": group, **consumer},
    )
    chosen = _Filter(series, symbols, clock or SystemClock(), duplicates, superseded, expired)
    try:
        await reader.open()
        while True:
            records = await reader.read()
            for record, forecast in chosen.select(records):
                if forecast is not None:
                    yield forecast
                await reader.mark_done(record)
            await reader.commit()
    finally:
        await reader.commit()
        await reader.close()


class _Reader:
    """A consumer that is opened anew, where it was, if it fails."""

    def __init__(
        self, topic: str, start: Literal["latest", "earliest"] | datetime, arguments: dict[str, Any]
    ) -> None:
        self._topic, self._start, self._arguments = topic, start, arguments
        self._consumer: AIOKafkaConsumer | None = None
        self._next: dict[TopicPartition, int] = {}
        """First offset of each partition that is not finished."""
        self._committed_at = 0.0

    async def open(self) -> AIOKafkaConsumer:
        reset = "latest" if isinstance(self._start, datetime) else self._start
        self._consumer = consumer = AIOKafkaConsumer(
            self._topic, enable_auto_commit=False, auto_offset_reset=reset, **self._arguments
        )
        await consumer.start()
        if self._arguments["group_id"] is not None:
            return consumer
        if not self._next and isinstance(self._start, datetime):
            wanted = round(self._start.timestamp() * 1000)
            found = await consumer.offsets_for_times(dict.fromkeys(consumer.assignment(), wanted))
            self._next = {place: at.offset for place, at in found.items() if at is not None}
        for place in consumer.assignment():
            if place in self._next:
                consumer.seek(place, self._next[place])
            else:  # "latest" is now, not whenever the first record comes
                self._next[place] = await consumer.position(place)
        return consumer

    async def read(self) -> list[ConsumerRecord]:
        """Some records, in order per partition; may be none."""
        try:
            consumer = self._consumer or await self.open()
            batches = await consumer.getmany(timeout_ms=_POLL_MS, max_records=_POLL_RECORDS)
        except (KafkaError, OSError) as error:
            _log.warning("no forecasts for now: %s", error)
            await self.close()
            await asyncio.sleep(_RECONNECT_SECONDS)
            return []
        return [record for batch in batches.values() for record in batch]

    async def mark_done(self, record: ConsumerRecord) -> None:
        self._next[TopicPartition(record.topic, record.partition)] = record.offset + 1
        if asyncio.get_running_loop().time() - self._committed_at > _COMMIT_SECONDS:
            await self.commit()

    async def commit(self) -> None:
        if self._arguments["group_id"] is None or self._consumer is None or not self._next:
            return
        self._committed_at = asyncio.get_running_loop().time()
        ours = self._consumer.assignment()
        done = {place: offset for place, offset in self._next.items() if place in ours}
        self._next.clear()
        try:
            if done:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self._consumer.commit(done)
        except (KafkaError, OSError) as error:  # they come again, to us or to another member
            _log.warning("position not committed: %s", error)

    async def close(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is None:
            return
        # A task of its own: with a fetch under way, aiokafka's stop raises a cancellation that is
        # none, and ours would be the loop that ends.
        ending = asyncio.ensure_future(consumer.stop())
        await asyncio.wait([ending], timeout=_CLOSE_SECONDS)
        if not ending.done():
            ending.cancel()
            _log.warning("consumer not closed in good order: it takes too long")
        elif not ending.cancelled() and (error := ending.exception()) is not None:
            _log.warning("consumer not closed in good order: %r", error)


class _Filter:
    """Which records are passed on."""

    def __init__(
        self,
        series: Collection[str] | None,
        symbols: Collection[str] | None,
        clock: Clock,
        duplicates: bool,  # noqa: FBT001
        superseded: bool,  # noqa: FBT001
        expired: bool,  # noqa: FBT001
    ) -> None:
        self._series = None if series is None else frozenset(series)
        self._symbols = None if symbols is None else frozenset(symbols)
        self._clock = clock
        self._duplicates, self._superseded, self._expired = duplicates, superseded, expired
        self._newest: OrderedDict[object, tuple[datetime, int]] = OrderedDict()
        """Origin and revision of the newest seen; whatever is not newer came before."""

    def select(
        self, records: Sequence[ConsumerRecord]
    ) -> Iterator[tuple[ConsumerRecord, Forecast | None]]:
        """Each record with its forecast, or None if that is not passed on."""
        parsed = [(record, self._parse(record)) for record in records]
        final: dict[object, int] = {}
        for _, forecast in parsed:
            if forecast is not None:
                place = _stream(forecast), forecast.origin
                final[place] = max(forecast.revision, final.get(place, 0))
        for record, forecast in parsed:
            wanted = (
                forecast is not None
                and (
                    self._superseded
                    or forecast.revision >= final[_stream(forecast), forecast.origin]
                )
                and (self._is_new(forecast) or self._duplicates)
                and (self._expired or forecast.valid_until.timestamp() * 1000 > self._clock.now())
            )
            yield record, forecast if wanted else None

    def _parse(self, record: ConsumerRecord) -> Forecast | None:
        if dict(record.headers).get("ce_type") == _REMOVAL:
            return None
        try:
            series = Series.parse(record.key.decode())
            if self._series is not None and series.name not in self._series:
                return None
            if self._symbols is not None and series.symbol not in self._symbols:
                return None
            return Forecast.parse(record.value)
        except (AttributeError, ValueError) as error:  # no key, or not what it should be
            place = f"{record.topic}[{record.partition}]@{record.offset}"
            _log.warning("record skipped, %s: %s", place, " ".join(str(error).split())[:300])
            return None

    def _is_new(self, forecast: Forecast) -> bool:
        stream, place = _stream(forecast), (forecast.origin, forecast.revision)
        newest = self._newest.get(stream)
        if newest is not None and place <= newest:
            return False
        self._newest[stream] = place
        self._newest.move_to_end(stream)
        if len(self._newest) > _MAX_STREAMS:
            self._newest.popitem(last=False)
        return True


def _stream(forecast: Forecast) -> object:
    """What a forecast has in common with those before and after it."""
    return forecast.series, forecast.model, forecast.sampling, len(forecast.times)
