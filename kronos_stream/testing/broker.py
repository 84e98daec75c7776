"""An embedded Kafka broker: librdkafka's in-process cluster, for demos and tests.

It speaks Kafka's protocol on the loopback, so every client consumes from it, in this process or
another: aiokafka, kcat, confluent-kafka, alone or in groups, with an idempotent producer. It is
not a broker to rely on:

- Everything is in memory and gone at :meth:`EmbeddedBroker.close`; nothing is replicated.
- A partition keeps its newest 5 MiB or 100,000 batches; a consumer further behind finds them gone.
- A topic exists as soon as anyone asks for it by name, always with 4 partitions. It cannot be
  created by request, configured, compacted or deleted: those requests are not understood.
- It refuses nothing a real broker would: neither a size nor a timestamp. Nor does it know TLS,
  SASL or access rules; it listens on 127.0.0.1 alone, on a port of its own choosing.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

from confluent_kafka import Producer

PARTITIONS = 4
"""Partitions of every topic."""

_START_SECONDS = 10.0


class EmbeddedBroker(AbstractContextManager["EmbeddedBroker"]):
    """Runs from construction to :meth:`close`, in threads of librdkafka's own.

    Starting takes a few milliseconds. ``topics`` exist from the start; ``brokers`` is the number
    of the cluster's nodes.
    """

    def __init__(self, topics: Iterable[str] = (), brokers: int = 1) -> None:
        # The cluster belongs to this client, which otherwise produces nothing.
        self._producer: Producer | None = Producer(
            {"test.mock.num.brokers": brokers, "log_level": 0}
        )
        nodes = self._producer.list_topics(timeout=_START_SECONDS).brokers.values()
        self.bootstrap = ",".join(sorted(f"{node.host}:{node.port}" for node in nodes))
        """Addresses for ``bootstrap.servers``."""
        for topic in topics:
            self._producer.list_topics(topic, timeout=_START_SECONDS)

    def close(self) -> None:
        """Stop, and forget everything; consumers see their connections end."""
        self._producer = None  # librdkafka ends the cluster with its owner

    def __exit__(self, *_: object) -> None:
        self.close()
