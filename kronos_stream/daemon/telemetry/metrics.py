"""What the daemon counts and times, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

_SKIP_REASONS = ("overrun", "stale", "gap", "warming up", "revised", "failed", "removed")
_RESTART_CAUSES = ("crash", "hang")


class Metrics:
    """One daemon's counters; a registry of its own, so that tests do not share them."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # process_*: memory, processor time, start

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"kronos_{name}", about, labels, registry=registry)

        def gauge(name: str, about: str, *labels: str) -> Gauge:
            return Gauge(f"kronos_{name}", about, labels, registry=registry)

        def histogram(name: str, about: str, *labels: str) -> Histogram:
            return Histogram(
                f"kronos_{name}", about, labels, buckets=_LATENCY_BUCKETS, registry=registry
            )

        self.build_info = gauge("build_info", "What runs; always 1", "version", "role")
        self.ready = gauge("ready", "1 while /readyz says so, else 0")
        self.series = gauge("series", "Series followed", "venue", "timeframe", "state")
        self.updates = counter("updates", "Candle updates received", "venue")
        self.rejected = counter("rejected", "Frames and candles that cannot be", "venue")
        self.source_events = counter("source_events", "What sources note", "venue", "event")
        self.bars = counter("bars", "Closed bars put on the tape", "venue", "timeframe")
        self.revisions = counter("revisions", "Closed bars changed by the venue", "venue", "age")
        self.gaps = counter("gaps", "Holes seen in what a venue pushed", "venue")
        self.backfills = counter("backfills", "Requests for missing bars", "venue", "result")
        self.synthetic_bars = counter("synthetic_bars", "Bars the venue does not have", "venue")
        self.silent_series = gauge("silent_series", "Series of which nothing is heard", "venue")
        self.held_series = gauge("held_series", "Series waiting for missing bars", "venue")
        self.outcomes = counter("outcomes", "What became of due bars", "result", "reason")
        self.batch_series = Histogram(
            "kronos_batch_series",
            "Series per batch",
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
            registry=registry,
        )
        self.close_to_received = histogram(
            "close_to_received_seconds", "Bar close to its last word"
        )
        self.received_to_batched = histogram(
            "received_to_batched_seconds", "Last word to the worker"
        )
        self.compute_seconds = histogram("compute_seconds", "A batch in the worker")
        self.received_to_published = histogram(
            "received_to_published_seconds", "Last word to delivery", "sink"
        )
        self.queue_depth = gauge("queue_depth", "Items waiting", "queue")
        self.outbox_age = gauge("outbox_age_seconds", "Age of the oldest undelivered", "sink")
        self.delivered = counter("delivered", "Records acknowledged", "sink", "kind")
        self.refused = counter("refused", "Records a sink will never take", "sink")
        self.expired = counter("expired", "Records too old to deliver, dropped", "sink")
        self.sink_failures = counter("sink_failures", "Deliveries to try again", "sink")
        self.worker_restarts = counter("worker_restarts", "Workers replaced", "cause")
        self.candle_lag = gauge("candle_lag", "Candle records of ours not read yet", "topic")
        self.rebuilds = histogram("rebuild_seconds", "Until a partition's contexts are whole")
        self.rebalances = counter("rebalances", "Times that the group shared out anew")
        self.loop_lag = histogram("event_loop_lag_seconds", "How late the event loop wakes")
        self.tasks = gauge("tasks", "Tasks of the event loop")

        # What has not happened yet is told as 0: nobody sees a counter rise that begins at 1.
        self.outcomes.labels("forecast", "")
        for reason in _SKIP_REASONS:
            self.outcomes.labels("skipped", reason)
        for cause in _RESTART_CAUSES:
            self.worker_restarts.labels(cause)

    def initialise_labels(self, *, venues: Iterable[str] = (), sinks: Iterable[str] = ()) -> None:
        """Tell of these venues and sinks from now on, though nothing has happened to them yet."""
        for venue in venues:
            for counter in (self.updates, self.rejected, self.gaps, self.synthetic_bars):
                counter.labels(venue)
            self.backfills.labels(venue, "failed")
            for age in ("newest", "older"):
                self.revisions.labels(venue, age)
        for sink in sinks:
            for counter in (self.refused, self.expired, self.sink_failures):
                counter.labels(sink)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
