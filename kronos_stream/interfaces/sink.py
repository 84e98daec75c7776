"""Sink interface: delivery of records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, NamedTuple, Protocol

from kronos_stream.market.clock import Clock
from kronos_stream.market.timeframe import Timeframe

RecordKind = Literal["forecast", "removal", "deadletter", "candle"]
"""A candle is a message of role ingest: a closed bar, or the removal of its series.

A removal ends the forecasts of a series; where only the newest forecast of each series is kept, it
deletes that one."""

Headers = tuple[tuple[str, bytes], ...]
"""CloudEvents attributes, binary mode."""


class Envelope(NamedTuple):
    """A message ready to be sent to the sinks."""

    kind: RecordKind
    key: str
    """Name of the series, used as the Kafka key; empty for a dead letter without a series."""
    value: bytes
    """JSON."""
    headers: Headers

    @property
    def id(self) -> str:
        """CloudEvents id."""
        return dict(self.headers)["ce_id"].decode()


class Record(NamedTuple):
    """An envelope in the outbox of one sink."""

    sequence: int
    """Position in the outbox; always increasing."""
    kind: RecordKind
    key: str
    value: bytes
    headers: Headers
    created: int
    """UTC ms when it was put into the outbox."""


class Refusal(NamedTuple):
    """A record that the sink refuses for good."""

    record: Record
    reason: str


class SinkUnavailable(Exception):  # noqa: N818
    """Delivery failed or is uncertain: all records must be delivered again."""


class SinkLoginRefused(SinkUnavailable):
    """The other side refuses the login until a password, certificate or setting is changed."""


class Sink(Protocol):
    """Delivery of records at least once, in order per key."""

    name: str

    async def start(self) -> None:
        """Prepare; SinkUnavailable if the other side cannot be reached: called again later."""

    async def deliver(self, records: Sequence[Record]) -> Sequence[Refusal]:
        """Return once each record is acknowledged or refused for good; bounded in time.

        SinkUnavailable otherwise: some may have arrived, and all are delivered again.
        """

    async def close(self) -> None:
        """Release resources; bounded in time. Unacknowledged records do not count as delivered."""


@dataclass(frozen=True, slots=True)
class RelayConnector:
    """Object of an entry point in the group ``kronos_stream.relays``: the sink of role ingest.

    Its settings are ``KRONOS_STREAM_<NAME>__<FIELD>``.
    """

    options: type[Any]
    """A pydantic model, every field with a default or a clear error."""
    build: Callable[[Any, Sequence[Timeframe], Clock, Random], Sink]
    """Builds the sink; receives the timeframes of the bars to come."""


@dataclass(frozen=True, slots=True)
class SinkConnector:
    """Object of an entry point in the group ``kronos_stream.sinks``.

    Its settings are ``KRONOS_STREAM_<NAME>__<FIELD>``.
    """

    options: type[Any]
    """A pydantic model, every field with a default or a clear error."""
    build: Callable[[Any, Clock, Random], Sink]
