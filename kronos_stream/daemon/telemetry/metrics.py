"""Metrics of the daemon, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BATCH_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

_SKIP_REASONS = ("overrun", "stale", "gap", "warming up", "revised", "failed", "removed")
_RESTART_CAUSES = ("crash", "hang")


class Metrics:
    """Metrics of one daemon, with a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # process_*: memory, CPU time, start time

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"kronos_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"kronos_{name}", text, labels, registry=registry)

        def histogram(
            name: str, text: str, *labels: str, buckets: Sequence[float] = _LATENCY_BUCKETS
        ) -> Histogram:
            return Histogram(f"kronos_{name}", text, labels, buckets=buckets, registry=registry)

        self.build_info = gauge("build_info", "Version and role; always 1", "version", "role")
        self.ready = gauge("ready", "1 if /readyz reports ready, else 0")
        self.series = gauge("series", "Followed series", "venue", "timeframe", "state")
        self.updates = counter("updates", "Candle updates received", "venue")
        self.rejected = counter("rejected", "Invalid frames and candles", "venue")
        self.source_events = counter("source_events", "Events of sources", "venue", "event")
        self.bars = counter("bars", "Closed bars confirmed", "venue", "timeframe")
        self.revisions = counter("revisions", "Closed bars corrected by the venue", "venue", "age")
        self.gaps = counter("gaps", "Gaps in the bars that a venue pushed", "venue")
        self.backfills = counter("backfills", "Requests for missing bars", "venue", "result")
        self.synthetic_bars = counter("synthetic_bars", "Bars missing at the venue", "venue")
        self.silent_series = gauge("silent_series", "Series without data", "venue")
        self.held_series = gauge("held_series", "Series waiting for missing bars", "venue")
        self.outcomes = counter("outcomes", "Outcomes of closed bars", "result", "reason")
        self.batch_series = histogram("batch_series", "Series per batch", buckets=_BATCH_BUCKETS)
        self.close_to_received = histogram(
            "close_to_received_seconds", "Close of a bar to its last update"
        )
        self.received_to_batched = histogram(
            "received_to_batched_seconds", "Last update to start of the batch"
        )
        self.compute_seconds = histogram("compute_seconds", "Inference of a batch")
        self.received_to_published = histogram(
            "received_to_published_seconds", "Last update to delivery", "sink"
        )
        self.queue_depth = gauge("queue_depth", "Items in a queue", "queue")
        self.outbox_age = gauge("outbox_age_seconds", "Age of the oldest pending record", "sink")
        self.delivered = counter("delivered", "Records acknowledged", "sink", "kind")
        self.refused = counter("refused", "Records rejected by a sink for good", "sink")
        self.expired = counter("expired", "Records dropped as too old to deliver", "sink")
        self.sink_failures = counter("sink_failures", "Failed deliveries, to be retried", "sink")
        self.worker_restarts = counter("worker_restarts", "Workers replaced", "cause")
        self.candle_lag = gauge("candle_lag", "Candle records not read yet", "topic")
        self.rebuilds = histogram("rebuild_seconds", "Assignment of a partition to full contexts")
        self.rebalances = counter("rebalances", "Rebalances of the consumer group")
        self.loop_lag = histogram("event_loop_lag_seconds", "Delay of the event loop")
        self.tasks = gauge("tasks", "Tasks of the event loop")
        self._initialise_outcomes()

    def _initialise_outcomes(self) -> None:
        """Start counters at 0: Prometheus sees no increase if one appears with 1."""
        self.outcomes.labels("forecast", "")
        for reason in _SKIP_REASONS:
            self.outcomes.labels("skipped", reason)
        for cause in _RESTART_CAUSES:
            self.worker_restarts.labels(cause)

    def initialise_labels(self, *, venues: Iterable[str] = (), sinks: Iterable[str] = ()) -> None:
        """Export counters of these venues and sinks with 0."""
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
        """Render all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
