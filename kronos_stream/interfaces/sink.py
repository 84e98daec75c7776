"""Where records go: what a sink is to the daemon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, NamedTuple, Protocol

from kronos_stream.market.clock import Clock
from kronos_stream.market.timeframe import Timeframe

RecordKind = Literal["forecast", "removal", "deadletter", "candle"]
"""A candle is what role ingest passes on: a closed bar, or that its series is given up.

A removal says that its series is not forecast any more; where only the newest forecast of each
series is kept, it takes that away."""


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
    """A record that the sink will never take."""

    record: Record
    reason: str


class SinkUnavailable(Exception):  # noqa: N818
    """Not delivered, or not known to be: everything given must be given again."""


class SinkLoginRefused(SinkUnavailable):
    """We are not let in until somebody changes something: a password, a certificate, a setting."""


class Sink(Protocol):
    """Delivers records at least once, in order per key."""

    name: str

    async def start(self) -> None:
        """Make ready; SinkUnavailable if the other side is not there, and then again later."""

    async def deliver(self, records: Sequence[Record]) -> Sequence[Refusal]:
        """Return once each record is acknowledged or refused for good; bounded in time.

        SinkUnavailable if any is neither: then some may have arrived, and all come again.
        """

    async def close(self) -> None:
        """Let go; bounded in time. Nothing given but unacknowledged counts as delivered."""


@dataclass(frozen=True, slots=True)
class RelayConnector:
    """What an entry point of the group ``kronos_stream.relays`` names: the sink of role ingest.

    Its settings are ``KRONOS_STREAM_<NAME>__<FIELD>``.
    """

    options: type[Any]
    """A pydantic model, every field with a default or a clear error."""
    build: Callable[[Any, Sequence[Timeframe], Clock, Random], Sink]
    """With the timeframes whose bars will come."""


@dataclass(frozen=True, slots=True)
class SinkConnector:
    """What an entry point of the group ``kronos_stream.sinks`` names.

    Its settings are ``KRONOS_STREAM_<NAME>__<FIELD>``.
    """

    options: type[Any]
    """A pydantic model, every field with a default or a clear error."""
    build: Callable[[Any, Clock, Random], Sink]
