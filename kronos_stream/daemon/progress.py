"""Whether the daemon gets on with its work: nothing may wait while none of it is done.

Waiting for others is no lack of progress: a venue that is silent leaves nothing to do, a sink that
is away is tried again, a worker that is lost is replaced. A task of ours that hangs is one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from kronos_stream.daemon.delivery import DELIVER_SECONDS, Delivery
from kronos_stream.daemon.desk import Desk
from kronos_stream.daemon.metrics import Metrics
from kronos_stream.daemon.scheduler import Scheduler
from kronos_stream.market.clock import Clock
from kronos_stream.market.feed import Feed

_MARGIN_SECONDS = 60.0
_SAVE_SECONDS = 120.0
_WAKE_SECONDS = 120.0
"""The wall clock may be set forward; whoever sleeps notices after a minute."""
_READ_SECONDS = 240.0
"""For a turn: more than the group may take to share out anew."""
_REPLACE_SECONDS = 900.0
"""Until a worker that does not start is given up, and the daemon with it."""


@dataclass(slots=True)
class Work:
    """Something that is worked off, and how it is seen that it is."""

    what: str
    """In words: who does what."""
    waits: Callable[[], object]
    """True while there is something to do."""
    done: Callable[[], object]
    """Changes with whatever is done."""
    seconds: Callable[[], float]
    """How long it may stay the same while something is to be done."""
    _seen: object = None
    _since: float | None = None

    def look(self, now: float) -> str:
        """What is wrong with it, in words; empty if nothing is. now: monotonic seconds."""
        done = self.done()
        if self._since is None or done != self._seen or not self.waits():
            self._seen, self._since = done, now
        still = now - self._since
        return f"{self.what}: nothing done for {still:.0f} s" if still > self.seconds() else ""


class Progress:
    """All that is worked off in one daemon."""

    def __init__(self) -> None:
        self._works: tuple[Work, ...] = ()

    def watch(self, *works: Iterable[Work]) -> None:
        """Look at these from now on, and at no others."""
        self._works = tuple(work for some in works for work in some)

    def overdue(self, now: float | None = None) -> str:
        """What does not get on, in words; empty if all does. To be asked now and then.

        now: monotonic seconds.
        """
        moment = time.monotonic() if now is None else now
        return "; ".join(filter(None, [work.look(moment) for work in self._works]))


def starting(seconds: float) -> Iterator[Work]:
    """The start, which is bounded as a whole."""
    yield Work("the start", lambda: True, lambda: None, lambda: seconds)


def taking_in(desk: Desk, clock: Clock) -> Iterator[Work]:
    """Closed bars are saved, and series looked after when it is time."""
    saving = desk.saving

    def late() -> bool:
        return desk.next_alarm is not None and desk.next_alarm <= clock.now()

    yield Work(
        "saving closed bars", lambda: not saving.idle, lambda: saving.done, lambda: _SAVE_SECONDS
    )
    yield Work("looking after series", late, lambda: desk.next_alarm, lambda: _WAKE_SECONDS)


class _Worker(Protocol):
    def healthy(self) -> str: ...


def forecasting(scheduler: Scheduler, worker: _Worker, metrics: Metrics) -> Iterator[Work]:
    """Due bars get their outcomes, or at least the worker is replaced."""

    def done() -> tuple[int, float]:
        lost = [sample.value for one in metrics.worker_restarts.collect() for sample in one.samples]
        return scheduler.told, sum(lost)

    def seconds() -> float:
        return _REPLACE_SECONDS if worker.healthy() else scheduler.longest + _MARGIN_SECONDS

    yield Work("forecasting due bars", lambda: scheduler.held, done, seconds)


def reading(feed: Feed) -> Iterator[Work]:
    """The feed turns, whether there is something to read or not."""
    yield Work("reading candles", lambda: True, lambda: feed.iterations, lambda: _READ_SECONDS)


def delivering(deliveries: Iterable[tuple[str, Delivery]]) -> Iterator[Work]:
    """Records are given to their sink, again and again if it does not take them."""
    for name, one in deliveries:
        yield _delivering(name, one)


def _delivering(name: str, one: Delivery) -> Work:
    return Work(
        f"delivering to {name}",
        lambda: not one.idle.is_set(),
        lambda: one.attempts,
        lambda: DELIVER_SECONDS + _MARGIN_SECONDS,
    )
