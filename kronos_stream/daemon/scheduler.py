"""From due bars to forecasts: batches by bar close, one at a time, and an outcome for every bar.

Bars close together, so they are forecast together: a batch waits until each live series' bar of
that close has come, or a moment at most. While one batch is computed the next gathers. Each series
has a lane, in which its bars stand in order; whatever is decided first, outcomes leave a lane from
its head.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import structlog

from kronos_stream.daemon.due import Due, Outcome
from kronos_stream.daemon.job import Failed
from kronos_stream.daemon.metrics import Metrics
from kronos_stream.daemon.worker import Batch
from kronos_stream.forecast.outlook import Outlook
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

if TYPE_CHECKING:
    from kronos_stream.market.contexts import Window

_log = structlog.get_logger()

CatchUp = Literal["newest", "all"]

_TURN = 32
"""Windows built before other tasks have their turn."""

_CHUNK = 256
"""Results published at a time."""

_CLOSES_KNOWN = 256

_LONGEST_WAIT_MS = 2000
_LONGEST_DEADLINE_SECONDS = 60.0
_SHORTEST_DEADLINE_SECONDS = 2.0


class Result(NamedTuple):
    """What became of a due bar, with the forecast if there is one."""

    due: Due
    window: Window | None = None
    outlook: Outlook | None = None
    reason: str = ""
    """Why it was skipped; empty for a forecast."""
    scale: float = 1.0
    """What prices were multiplied with for the model."""
    queued_ms: int = 0
    """From the bar's arrival to the worker."""
    compute_ms: int = 0
    """What its batch took in the worker."""

    @property
    def outcome(self) -> Outcome:
        due = self.due
        kind: Literal["forecast", "skipped"] = "skipped" if self.outlook is None else "forecast"
        return Outcome(due.series.name, due.origin, due.revision, kind, self.reason)


class Forecasting(Protocol):
    """What the scheduler needs of a worker."""

    def expected(self, series: int) -> float: ...

    def capacity(self, seconds: float) -> int: ...

    async def forecast(self, windows: Sequence[Window], deadline: float) -> Batch: ...


@dataclass(slots=True, eq=False)
class _Item:
    """A due bar in its lane."""

    due: Due
    arrived: int
    taken: bool = False
    """True from the moment a batch takes it."""
    result: Result | None = None

    @property
    def waiting(self) -> bool:
        return not self.taken and self.result is None


@dataclass(slots=True)
class _Gathering:
    """Bars of one close, until all have come or the time is up."""

    until: int
    items: list[_Item] = field(default_factory=list)
    released: bool = False


class Scheduler:
    """Turns due bars into results. ``due`` at any time; ``run`` once."""

    def __init__(
        self,
        worker: Forecasting,
        window: Callable[[Due], Awaitable[Window | None]],
        awaited: Callable[[int], int],
        publish: Callable[[Sequence[Result]], Awaitable[None]],
        clock: Clock,
        metrics: Metrics,
        *,
        catch_up: CatchUp = "newest",
        batch_wait: float | None = None,
        batch_deadline: float | None = None,
        most: int = 1000,
        backlog: int = 200_000,
    ) -> None:
        """What it takes to forecast, and where results go.

        window: what a bar is forecast from; None if that is gone.
        awaited: how many live series' bars of this close, UTC ms, have not come yet.
        publish: returns once the results are safe; its failures end :meth:`run`.
        catch_up: when behind, "newest" skips a bar that a newer one of its series has overtaken;
            "all" forecasts every one.
        batch_wait: seconds after the first bar of a close that others of it are waited for; None
            takes a quarter of the time for which its forecast would be valid, at most 2.
        batch_deadline: seconds for a batch in the worker; None takes 0.8 of the timeframe, between
            2 and 60.
        most: series in a batch. backlog: bars that may wait; beyond, the oldest are skipped even
            where all are asked for.
        """
        self._worker, self._window, self._awaited = worker, window, awaited
        self._publish, self._clock, self._metrics = publish, clock, metrics
        self._catch_up = catch_up
        self._batch_wait, self._batch_deadline = batch_wait, batch_deadline
        self._most, self._backlog = most, backlog
        self._lanes: dict[Series, deque[_Item]] = {}
        self._closes: dict[int, _Gathering] = {}
        self._ready: dict[Series, deque[_Item]] = {}
        self._decided: dict[Series, None] = {}
        """Series whose lanes may have results at the head."""
        self._waiting = self._unpublished = 0
        self._turn = 0
        self._last_turn: dict[Series, int] = {}
        self._hurried = 0
        self._finishing = self._worked = False
        self._news, self._results = asyncio.Event(), asyncio.Event()
        self._settled, self._ended = asyncio.Event(), asyncio.Event()
        self._settled.set()

    def due(self, due: Due) -> None:
        """Take in a bar; in order per series. Returns at once."""
        if self._finishing:
            return
        now = self._clock.now()
        lane = self._lanes.setdefault(due.series, deque())
        item = _Item(due, now)
        before = lane[-1] if lane else None
        lane.append(item)
        self._waiting += 1
        self._unpublished += 1
        self._settled.clear()
        self._metrics.received.observe(max(0, due.received - due.close) / 1000)
        if before is not None and before.waiting:
            if before.due.origin == due.origin:
                self._skip(before, "revised")
            elif self._catch_up == "newest":
                self._skip(before, "overrun")
        if due.obstacle is not None:
            self._skip(item, due.obstacle)
            return
        if self._waiting > self._backlog:
            self._skip(next(item for item in lane if item.waiting), "overrun")
        self._gather(item, now)
        self._metrics.queued.labels("due").set(self._waiting)
        self._news.set()

    async def run(self) -> None:
        """Work until cancelled, or until :meth:`finish`. Fails if publishing or the worker does."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._work())
                tasks.create_task(self._publish_results())
        finally:
            self._ended.set()

    async def settled(self) -> None:
        """Return once every bar taken in has its result published; nobody is waited for then."""
        self._hurried += 1
        self._news.set()
        try:
            await self._settled.wait()
        finally:
            self._hurried -= 1

    async def finish(self, grace: float) -> bool:
        """Take in no more, finish the batch in hand and end :meth:`run`; True if done in time.

        Bars still waiting get no result: they are due again when the daemon starts again.
        grace: seconds.
        """
        self._finishing = True
        self._news.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._ended.wait()
        return self._ended.is_set()

    async def _work(self) -> None:
        while not self._finishing:
            self._news.clear()
            self._release()
            batch, deadline = self._form()
            if batch:
                await self._forecast(batch, deadline)
            else:
                await self._wait()
        self._worked = True
        self._results.set()

    async def _wait(self) -> None:
        """Until something has come, or the time of a gathering close is up."""
        ends = [close.until for close in self._closes.values() if not close.released]
        waits = [asyncio.create_task(self._news.wait())]
        if ends:
            waits.append(asyncio.create_task(self._time_up(min(ends))))
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in done:
                wait.result()
        finally:
            for wait in waits:
                wait.cancel()

    async def _time_up(self, moment: int) -> Literal[True]:
        await self._clock.sleep_until(moment)
        return True

    def _gather(self, item: _Item, now: int) -> None:
        """Put a bar to the others of its close; one that comes late waits no more."""
        close = self._closes.get(item.due.close)
        if close is None:
            close = self._closes[item.due.close] = _Gathering(now + self._wait_ms(item.due, now))
            while len(self._closes) > _CLOSES_KNOWN and next(iter(self._closes.values())).released:
                del self._closes[next(iter(self._closes))]
        close.until = min(close.until, now + self._wait_ms(item.due, now))
        if close.released:
            self._ready.setdefault(item.due.series, deque()).append(item)
        else:
            close.items.append(item)

    def _release(self) -> None:
        """Make ready the closes that are complete or out of time, and those before them."""
        now = self._clock.now()
        gathering = [time for time, close in self._closes.items() if not close.released]
        complete = [
            time
            for time in gathering
            if self._hurried or self._closes[time].until <= now or self._awaited(time) == 0
        ]
        for time in sorted(time for time in gathering if complete and time <= max(complete)):
            close = self._closes[time]
            close.released = True
            for item in close.items:
                self._ready.setdefault(item.due.series, deque()).append(item)
            close.items.clear()

    def _form(self) -> tuple[list[_Item], float]:
        """The next batch and the seconds it may take: who waited longest for a forecast first."""
        for series, items in list(self._ready.items()):
            while items and not items[0].waiting:
                items.popleft()
            if items and self._catch_up == "newest":
                self._drop_expired(items[0])
            if not items or not items[0].waiting:
                del self._ready[series]
        if not self._ready:
            return [], 0.0
        deadline = min(self._deadline(series.timeframe) for series in self._ready)
        room = min(self._most, self._worker.capacity(deadline / 2))
        batch = list(self._in_turn(room))
        self._turn += 1
        for item in batch:
            item.taken = True
            self._last_turn[item.due.series] = self._turn
        self._waiting -= len(batch)
        self._metrics.queued.labels("due").set(self._waiting)
        return batch, max(deadline, 2 * self._worker.expected(len(batch)))

    def _drop_expired(self, item: _Item) -> None:
        """Skip a series' newest bar when its forecast could not be valid any more."""
        if (end := _valid_until(item.due)) <= self._clock.now():
            # It came too late, or it was kept here too long.
            self._skip(item, "stale" if item.arrived >= end else "overrun")

    def _in_turn(self, room: int) -> Iterator[_Item]:
        """At most ``room`` bars: first one of each series, then their second ones."""
        series = sorted(self._ready, key=lambda series: self._last_turn.get(series, 0))
        for items in zip_longest(*(self._ready[one] for one in series)):
            for item in items:
                if item is not None and item.waiting:
                    if not room:
                        return
                    room -= 1
                    yield item

    async def _forecast(self, batch: list[_Item], deadline: float) -> None:
        items: list[_Item] = []
        windows: list[Window] = []
        for i, item in enumerate(batch, 1):
            window = await self._window(item.due)
            if window is None:
                self._decide(item, Result(item.due, reason="gap"))
            else:
                items.append(item)
                windows.append(window)
            if i % _TURN == 0:
                await asyncio.sleep(0)
        if not items:
            return
        now = self._clock.now()
        drawn, seconds = await self._worker.forecast(windows, deadline)
        self._metrics.batch_series.observe(len(items))
        self._metrics.computed.observe(seconds)
        _log.debug("batch drawn", batch=self._turn, series=len(items), seconds=round(seconds, 3))
        for item, window, made in zip(items, windows, drawn, strict=True):
            queued = max(0, now - item.due.received)
            self._metrics.batched.observe(queued / 1000)
            times = queued, round(1000 * seconds)
            if isinstance(made, Failed):
                _log.warning(
                    "forecast failed",
                    series=item.due.series.name,
                    origin=item.due.origin,
                    batch=self._turn,
                    why=made.reason,
                )
                result = Result(item.due, window, None, "failed", 1.0, *times)
            else:
                result = Result(item.due, window, made.outlook, "", made.scale, *times)
            self._decide(item, result)

    def _skip(self, item: _Item, reason: str) -> None:
        """Decide a bar that waits."""
        self._waiting -= 1
        self._decide(item, Result(item.due, reason=reason))

    def _decide(self, item: _Item, result: Result) -> None:
        item.result = result
        self._decided[item.due.series] = None
        self._results.set()

    async def _publish_results(self) -> None:
        while True:
            await self._results.wait()
            self._results.clear()
            while results := self._heads():
                await self._publish(results)
                for outcome in (result.outcome for result in results):
                    self._metrics.outcomes.labels(outcome.result, outcome.reason).inc()
                self._unpublished -= len(results)
                if not self._unpublished:
                    self._settled.set()
            if self._worked:
                return

    def _heads(self) -> list[Result]:
        """Results that have nothing undecided before them in their lanes; a chunk at most."""
        results: list[Result] = []
        for series in list(self._decided):
            lane = self._lanes[series]
            while lane and lane[0].result is not None:
                if len(results) == _CHUNK:
                    return results
                results.append(lane[0].result)
                lane.popleft()
            del self._decided[series]
            if not lane:
                del self._lanes[series]
        return results

    def _wait_ms(self, due: Due, now: int) -> int:
        if self._batch_wait is not None:
            return round(1000 * self._batch_wait)
        return max(0, min((_valid_until(due) - now) // 4, _LONGEST_WAIT_MS))

    def _deadline(self, timeframe: Timeframe) -> float:
        if self._batch_deadline is not None:
            return self._batch_deadline
        most = min(0.8 * _seconds(timeframe), _LONGEST_DEADLINE_SECONDS)
        return max(_SHORTEST_DEADLINE_SECONDS, most)


def _valid_until(due: Due) -> int:
    """Close of the next bar, UTC ms."""
    return due.series.timeframe.after(due.close)


def _seconds(timeframe: Timeframe) -> float:
    """A bar's length; months are long."""
    length = timeframe.milliseconds
    return float("inf") if length is None else length / 1000
