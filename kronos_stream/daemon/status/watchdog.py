"""Whether the daemon gets on with its work: nothing may wait while none of it is done.

Waiting for others is no lack of progress: a venue that is silent leaves nothing to do, a sink that
is away is tried again, a worker that is lost is replaced. A task of ours that hangs is one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from kronos_stream.daemon.delivery.sink_queue import DELIVER_TIMEOUT_SECONDS, SinkQueue
from kronos_stream.daemon.intake.pipeline import IntakePipeline
from kronos_stream.daemon.scheduling.scheduler import Scheduler
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.feed import Feed
from kronos_stream.market.clock import Clock

_MARGIN_SECONDS = 60.0
_SAVE_SECONDS = 120.0
_WAKE_SECONDS = 120.0
"""The wall clock may be set forward; whoever sleeps notices after a minute."""
_READ_SECONDS = 240.0
"""For a turn: more than the group may take to share out anew."""
_REPLACE_SECONDS = 900.0
"""Until a worker that does not start is given up, and the daemon with it."""


@dataclass(slots=True)
class StallCheck:
    """Something that is worked off, and how it is seen that it is."""

    name: str
    """In words: who does what."""
    pending: Callable[[], object]
    """True while there is something to do."""
    progress: Callable[[], object]
    """Changes with whatever is done."""
    timeout: Callable[[], float]
    """How long it may stay the same while something is to be done."""
    _last_progress: object = None
    _last_change: float | None = None

    def check(self, now: float) -> str:
        """What is wrong with it, in words; empty if nothing is. now: monotonic seconds."""
        done = self.progress()
        if self._last_change is None or done != self._last_progress or not self.pending():
            self._last_progress, self._last_change = done, now
        still = now - self._last_change
        return f"{self.name}: nothing done for {still:.0f} s" if still > self.timeout() else ""


class Watchdog:
    """All that is worked off in one daemon."""

    def __init__(self) -> None:
        self._checks: tuple[StallCheck, ...] = ()

    def set_checks(self, *works: Iterable[StallCheck]) -> None:
        """Look at these from now on, and at no others."""
        self._checks = tuple(work for some in works for work in some)

    def stalled(self, now: float | None = None) -> str:
        """What does not get on, in words; empty if all does. To be asked now and then.

        now: monotonic seconds.
        """
        moment = time.monotonic() if now is None else now
        return "; ".join(filter(None, [work.check(moment) for work in self._checks]))


def startup_checks(seconds: float) -> Iterator[StallCheck]:
    """The start, which is bounded as a whole."""
    yield StallCheck("the start", lambda: True, lambda: None, lambda: seconds)


def intake_checks(desk: IntakePipeline, clock: Clock) -> Iterator[StallCheck]:
    """Closed bars are saved, and series looked after when it is time."""
    saving = desk.save_queue

    def late() -> bool:
        return desk.next_timer is not None and desk.next_timer <= clock.now()

    yield StallCheck(
        "saving closed bars", lambda: not saving.idle, lambda: saving.commits, lambda: _SAVE_SECONDS
    )
    yield StallCheck("looking after series", late, lambda: desk.next_timer, lambda: _WAKE_SECONDS)


class _Backend(Protocol):
    def problem(self) -> str: ...


def forecast_checks(
    scheduler: Scheduler, worker: _Backend, metrics: Metrics
) -> Iterator[StallCheck]:
    """Due bars get their outcomes, or at least the worker is replaced."""

    def done() -> tuple[int, float]:
        lost = [sample.value for one in metrics.worker_restarts.collect() for sample in one.samples]
        return scheduler.published, sum(lost)

    def seconds() -> float:
        return (
            _REPLACE_SECONDS
            if worker.problem()
            else scheduler.max_latency_seconds + _MARGIN_SECONDS
        )

    yield StallCheck("forecasting due bars", lambda: scheduler.pending, done, seconds)


def feed_checks(feed: Feed) -> Iterator[StallCheck]:
    """The feed turns, whether there is something to read or not."""
    yield StallCheck(
        "reading candles", lambda: True, lambda: feed.iterations, lambda: _READ_SECONDS
    )


def delivery_checks(deliveries: Iterable[tuple[str, SinkQueue]]) -> Iterator[StallCheck]:
    """Records are given to their sink, again and again if it does not take them."""
    for name, one in deliveries:
        yield _delivery_check(name, one)


def _delivery_check(name: str, one: SinkQueue) -> StallCheck:
    return StallCheck(
        f"delivering to {name}",
        lambda: not one.idle.is_set(),
        lambda: one.attempts,
        lambda: DELIVER_TIMEOUT_SECONDS + _MARGIN_SECONDS,
    )
