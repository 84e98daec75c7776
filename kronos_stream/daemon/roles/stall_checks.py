"""Stall checks of the daemon's parts, for the watchdog."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kronos_stream.daemon.delivery.sink_queue import DELIVER_TIMEOUT_SECONDS, SinkQueue
from kronos_stream.daemon.inference.backend import InferenceBackend
from kronos_stream.daemon.intake.pipeline import IntakePipeline
from kronos_stream.daemon.scheduling.scheduler import Scheduler
from kronos_stream.daemon.status.watchdog import StallCheck
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.feed import Feed
from kronos_stream.market.clock import Clock

_MARGIN_SECONDS = 60.0
_SAVE_SECONDS = 120.0
_TIMER_SECONDS = 120.0
"""After the wall clock is set forward, a sleeping task notices within a minute."""
_READ_SECONDS = 240.0
"""Longer than a rebalance of the consumer group may take."""
_REPLACE_SECONDS = 900.0
"""By then, a worker that does not start has ended the daemon."""


def startup(seconds: float) -> Iterator[StallCheck]:
    """The start ends within ``seconds``."""
    yield StallCheck("the start", lambda: True, lambda: None, lambda: seconds)


def intake(pipeline: IntakePipeline, clock: Clock) -> Iterator[StallCheck]:
    """Closed bars are saved, and timers fire on time."""
    queue = pipeline.save_queue

    def overdue() -> bool:
        return pipeline.next_timer is not None and pipeline.next_timer <= clock.now()

    yield StallCheck(
        "saving closed bars", lambda: not queue.idle, lambda: queue.commits, lambda: _SAVE_SECONDS
    )
    yield StallCheck(
        "timers of series", overdue, lambda: pipeline.next_timer, lambda: _TIMER_SECONDS
    )


def forecasting(
    scheduler: Scheduler, worker: InferenceBackend, metrics: Metrics
) -> Iterator[StallCheck]:
    """Forecast requests get results, or the worker is being replaced."""

    def progress() -> tuple[int, float]:
        restarts = metrics.worker_restarts.collect()
        return scheduler.published, sum(one.value for family in restarts for one in family.samples)

    def timeout() -> float:
        latency = scheduler.max_latency_seconds + _MARGIN_SECONDS
        return _REPLACE_SECONDS if worker.problem() else latency

    yield StallCheck("forecasting", lambda: scheduler.pending, progress, timeout)


def feed(feed: Feed) -> Iterator[StallCheck]:
    """The feed polls, also while there is nothing to read."""
    yield StallCheck(
        "reading candles", lambda: True, lambda: feed.iterations, lambda: _READ_SECONDS
    )


def delivery(queues: Iterable[tuple[str, SinkQueue]]) -> Iterator[StallCheck]:
    """Each sink attempts to deliver pending records."""
    for name, queue in queues:
        yield _sink_check(name, queue)


def _sink_check(name: str, queue: SinkQueue) -> StallCheck:
    return StallCheck(
        f"delivering to {name}",
        lambda: not queue.idle.is_set(),
        lambda: queue.attempts,
        lambda: DELIVER_TIMEOUT_SECONDS + _MARGIN_SECONDS,
    )
