"""An embedded Kafka broker: librdkafka's in-process cluster, for demos and tests.

It implements Kafka's protocol on the loopback interface, for clients in this process or another:
aiokafka, kcat, confluent-kafka, alone or in groups, with an idempotent producer. Do not use it in
production:

- Everything is in memory and gone at :meth:`EmbeddedBroker.close`; nothing is replicated.
- A partition keeps its newest 5 MiB or 100,000 batches; older records are deleted.
- A topic is created when a client first uses its name, always with 4 partitions. Requests to
  create, configure or delete topics are not supported, nor is compaction.
- It rejects no records because of size or timestamp, and supports neither TLS, SASL nor
  access rules; it listens on 127.0.0.1 only, on a free port.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

from confluent_kafka import Producer

PARTITIONS = 4
"""Partitions of every topic."""

_START_SECONDS = 10.0


class EmbeddedBroker(AbstractContextManager["EmbeddedBroker"]):
    """A cluster that runs from construction to :meth:`close`, in threads of librdkafka.

    Starting takes a few milliseconds. ``topics`` exist from the start; ``brokers`` is the number
    of the cluster's nodes.
    """

    def __init__(self, topics: Iterable[str] = (), brokers: int = 1) -> None:
        # This client owns the cluster; it produces nothing.
        self._producer: Producer | None = Producer(
            {"test.mock.num.brokers": brokers, "log_level": 0}
        )
        nodes = self._producer.list_topics(timeout=_START_SECONDS).brokers.values()
        self.bootstrap = ",".join(sorted(f"{node.host}:{node.port}" for node in nodes))
        """Addresses for ``bootstrap.servers``."""
        for topic in topics:
            self._producer.list_topics(topic, timeout=_START_SECONDS)

    def close(self) -> None:
        """Stop, and drop all records; connections of consumers end."""
        self._producer = None  # librdkafka ends the cluster with its owner

    def __exit__(self, *_: object) -> None:
        self.close()
