"""Client for trading bots: typed forecasts from Kafka, without duplicates or expired ones.

::

    import asyncio
    from kronos_stream.client import forecasts

    async def main():
        async for forecast in forecasts("localhost:9092", symbols=["BTC/USDT"]):
            print(forecast.series, forecast.summary.p_up, forecast.close["q50"][-1])

    asyncio.run(main())

Needs neither a model nor torch.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from kronos_stream.forecast.message import REMOVAL, Forecast
from kronos_stream.market.clock import Clock, SystemClock
from kronos_stream.market.series import Series

__all__ = ["Forecast", "forecasts"]

_log = logging.getLogger(__name__)  # the standard library: this runs in users' programs

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
    """Yield forecasts as they are published, in order per series.

    bootstrap: brokers as ``host:port``, separated by commas.
    series, symbols: yield only these, such as ``binance:BTC/USDT:5m`` and ``BTC/USDT``.
    group: name of a consumer group, whose members share the series and continue at the group's
        position. It is committed as the loop body finishes forecasts; a crash repeats some.
    start: first forecasts if the group has no position: new ones, all, or (without group) those
        published since a time.
    duplicates: also yield repeated records; delivery is at least once.
    superseded: also yield those of which a higher revision has already come.
    expired: also yield those whose ``valid_until`` has passed by ``clock``, the system clock.
    consumer: arguments for aiokafka's consumer: ``security_protocol``, ``ssl_context``,
        ``sasl_mechanism``, ``sasl_plain_username``, ``sasl_plain_password`` and so on.

    Raises aiokafka's KafkaConnectionError if no broker answers at the start; later it reconnects.
    Invalid records are skipped with a warning.
    """
    if group is not None and isinstance(start, datetime):
        raise ValueError("start: a group cannot start at a time; use latest or earliest")
    reader = _Reader(
        f"{topic_prefix}.forecasts.v1",
        start,
        {"bootstrap_servers": bootstrap, "group_id": group, **consumer},
    )
    selection = _Filter(
        clock or SystemClock(),
        series=series and frozenset(series),
        symbols=symbols and frozenset(symbols),
        duplicates=duplicates,
        superseded=superseded,
        expired=expired,
    )
    try:
        await reader.open()
        while True:
            records = await reader.read()
            for record, forecast in selection.select(records):
                if forecast is not None:
                    yield forecast
                await reader.mark_done(record)
            await reader.commit()
    finally:
        await reader.commit()
        await reader.close()


class _Reader:
    """A consumer that reconnects at its position after an error."""

    def __init__(
        self, topic: str, start: Literal["latest", "earliest"] | datetime, arguments: dict[str, Any]
    ) -> None:
        self._topic, self._start, self._arguments = topic, start, arguments
        self._consumer: AIOKafkaConsumer | None = None
        self._next: dict[TopicPartition, int] = {}
        """First offset of each partition that is not done."""
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
            self._next = {part: first.offset for part, first in found.items() if first is not None}
        for partition in consumer.assignment():
            if partition in self._next:
                consumer.seek(partition, self._next[partition])
            else:  # "latest" means now, not when the first record comes
                self._next[partition] = await consumer.position(partition)
        return consumer

    async def read(self) -> list[ConsumerRecord]:
        """Read records, in order per partition; may be none."""
        try:
            consumer = self._consumer or await self.open()
            batches = await consumer.getmany(timeout_ms=_POLL_MS, max_records=_POLL_RECORDS)
        except (KafkaError, OSError) as error:
            _log.warning("forecasts interrupted, reconnecting: %s", error)
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
        assigned = self._consumer.assignment()
        done = {partition: n for partition, n in self._next.items() if partition in assigned}
        self._next.clear()
        try:
            if done:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self._consumer.commit(done)
        except (KafkaError, OSError) as error:  # these records are read again, by any member
            _log.warning("position not committed: %s", error)

    async def close(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is None:
            return
        # A task of its own: during a fetch, aiokafka's stop raises a CancelledError of its own,
        # which would otherwise cancel this task.
        stop = asyncio.ensure_future(consumer.stop())
        await asyncio.wait([stop], timeout=_CLOSE_SECONDS)
        if not stop.done():
            stop.cancel()
            _log.warning("consumer not closed properly: no end after %g s", _CLOSE_SECONDS)
        elif not stop.cancelled() and (error := stop.exception()) is not None:
            _log.warning("consumer not closed properly: %r", error)


@dataclass
class _Filter:
    """Selection of the forecasts to yield."""

    clock: Clock
    series: Collection[str] | None = None
    symbols: Collection[str] | None = None
    duplicates: bool = False
    superseded: bool = False
    expired: bool = False
    newest: OrderedDict[object, tuple[datetime, int]] = field(default_factory=OrderedDict)
    """Origin and revision of the newest forecast per stream; others are duplicates."""

    def select(
        self, records: Sequence[ConsumerRecord]
    ) -> Iterator[tuple[ConsumerRecord, Forecast | None]]:
        """Pair each record with its forecast, or None if that is not selected."""
        parsed = [(record, self._parse(record)) for record in records]
        final: dict[object, int] = {}
        for _, forecast in parsed:
            if forecast is not None:
                bar = _stream(forecast), forecast.origin
                final[bar] = max(forecast.revision, final.get(bar, 0))
        for record, forecast in parsed:
            selected = (
                forecast is not None
                and (
                    self.superseded
                    or forecast.revision >= final[_stream(forecast), forecast.origin]
                )
                and (self._is_new(forecast) or self.duplicates)
                and (self.expired or forecast.valid_until.timestamp() * 1000 > self.clock.now())
            )
            yield record, forecast if selected else None

    def _parse(self, record: ConsumerRecord) -> Forecast | None:
        if dict(record.headers).get("ce_type") == _REMOVAL:
            return None
        try:
            series = Series.parse(record.key.decode())
            if self.series is not None and series.name not in self.series:
                return None
            if self.symbols is not None and series.symbol not in self.symbols:
                return None
            return Forecast.parse(record.value)
        except (AttributeError, ValueError) as error:  # no key, or not a valid message
            place = f"{record.topic}[{record.partition}]@{record.offset}"
            _log.warning("record skipped, %s: %s", place, " ".join(str(error).split())[:300])
            return None

    def _is_new(self, forecast: Forecast) -> bool:
        stream, version = _stream(forecast), (forecast.origin, forecast.revision)
        newest = self.newest.get(stream)
        if newest is not None and version <= newest:
            return False
        self.newest[stream] = version
        self.newest.move_to_end(stream)
        if len(self.newest) > _MAX_STREAMS:
            self.newest.popitem(last=False)
        return True


def _stream(forecast: Forecast) -> object:
    """Common key of successive forecasts."""
    return forecast.series, forecast.model, forecast.sampling, len(forecast.times)
