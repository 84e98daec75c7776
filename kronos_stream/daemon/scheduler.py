"""From due bars to forecasts: batches by bar close, one at a time, and an outcome for every bar.

While one batch is computed the next gathers (:mod:`kronos_stream.daemon.batches`). Whatever is
decided first, results are told in order per series (:mod:`kronos_stream.daemon.lanes`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Literal, Protocol

import structlog

from kronos_stream.daemon.batches import Gathering, valid_until
from kronos_stream.daemon.due import Due, Result
from kronos_stream.daemon.job import Drawn, Failed
from kronos_stream.daemon.lanes import Item, Lanes
from kronos_stream.daemon.metrics import Metrics
from kronos_stream.daemon.worker import Batch
from kronos_stream.market.clock import Clock
from kronos_stream.market.contexts import Window
from kronos_stream.market.timeframe import Timeframe

__all__ = ["CatchUp", "Forecasting", "Result", "Scheduler"]

_log = structlog.get_logger()

CatchUp = Literal["newest", "all"]

_TURN = 32
"""Windows built before other tasks have their turn."""

_CHUNK = 256
"""Results published at a time."""

_SHORTEST_DEADLINE_SECONDS = 2.0
_LONGEST_DEADLINE_SECONDS = 60.0


class Forecasting(Protocol):
    """What the scheduler needs of a worker."""

    def expected(self, series: int) -> float: ...

    def capacity(self, seconds: float) -> int: ...

    async def forecast(self, windows: Sequence[Window], deadline: float) -> Batch: ...


class Scheduler:
    """Turns due bars into results. ``due`` at any time; ``run`` once."""

    def __init__(
        self,
        worker: Forecasting,
        window: Callable[[Due], Awaitable[Window | None]],
        awaited: Callable[[int], int],
        publish: Callable[[Sequence[Result]], Awaitable[Sequence[Result]]],
        clock: Clock,
        metrics: Metrics,
        *,
        catch_up: CatchUp = "newest",
        batch_wait: float | None = None,
        batch_deadline: float | None = None,
        longest: float = _LONGEST_DEADLINE_SECONDS,
        most: int = 1000,
        backlog: int = 200_000,
    ) -> None:
        """What it takes to forecast, and where results go.

        window: what a bar is forecast from; None if that is gone.
        awaited: how many live series' bars of this close, UTC ms, have not come yet.
        publish: returns once the results are safe, which may be fewer or others; its failures end
            :meth:`run`.
        catch_up: when behind, "newest" skips a bar that a newer one of its series has overtaken;
            "all" forecasts every one.
        batch_wait: seconds after the first bar of a close that others of it are waited for; None
            takes a quarter of the time for which its forecast would be valid, at most 2.
        batch_deadline: seconds for a batch in the worker; None takes 0.8 of the timeframe, between
            2 and 60. Batches are sized to take at most half of it.
        longest: seconds that no batch's deadline exceeds, if it is not set.
        most: series in a batch. backlog: bars that may wait; beyond, the oldest are skipped even
            where all are asked for.
        """
        self._worker, self._window, self._publish = worker, window, publish
        self._clock, self._metrics = clock, metrics
        self._catch_up = catch_up
        self._batch_wait, self._batch_deadline = batch_wait, batch_deadline
        self._longest, self._most, self._backlog = longest, most, backlog
        self._lanes = Lanes()
        self._gathering = Gathering(awaited, batch_wait)
        self._waiting = self._batches = self._hurried = 0
        self._finishing = self._worked = False
        self._news, self._settled, self._ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._settled.set()

    def due(self, due: Due) -> None:
        """Take in a bar; in order per series. Returns at once."""
        if self._finishing:
            return
        self._settled.clear()
        item = Item(due, self._clock.now())
        before = self._lanes.add(item)
        self._waiting += 1
        self._metrics.received.observe(max(0, due.received - due.close) / 1000)
        if before is not None and before.due.origin == due.origin:
            self._skip(before, "revised")
        elif before is not None and self._catch_up == "newest":
            self._skip(before, "overrun")
        if self._waiting > self._backlog:
            oldest = self._lanes.oldest_waiting(due.series)
            if oldest is not None:
                self._skip(oldest, "overrun")
        if due.obstacle is not None:
            self._skip(item, due.obstacle)
        else:
            self._gathering.add(item)
            self._news.set()
        self._metrics.queued.labels("due").set(self._waiting)

    async def run(self) -> None:
        """Work until cancelled, or until :meth:`finish`. Fails if publishing or the worker does."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._work())
                tasks.create_task(self._tell())
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

    @property
    def held(self) -> int:
        """Bars taken in whose results are not published yet."""
        return self._lanes.held

    @property
    def told(self) -> int:
        """Results published so far."""
        return self._lanes.through

    @property
    def longest(self) -> float:
        """Seconds from a bar until its result, where the first attempt of a batch is good."""
        deadline = self._batch_deadline or self._longest
        return (self._batch_wait or 0.0) + max(deadline, 2 * self._worker.expected(1))

    def withdraw(self) -> None:
        """Take back all bars that wait for a batch, and those of their series behind them.

        They get no result, and may be due again.
        """
        for item in self._lanes.withdraw():
            self._skip(item, "withdrawn")

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
            self._gathering.release(self._clock.now(), hurry=self._hurried > 0)
            batch, deadline = self._form()
            if batch:
                await self._forecast(batch, deadline)
            else:
                await self._wait()
        self._worked = True
        self._lanes.decided.set()

    async def _wait(self) -> None:
        """Until something has come, or the time of a gathering close is up."""
        waits = [asyncio.ensure_future(self._news.wait())]
        end = self._gathering.next_end()
        if end is not None:
            waits.append(asyncio.ensure_future(self._until(end)))
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in done:
                wait.result()
        finally:
            for wait in waits:
                wait.cancel()

    async def _until(self, moment: int) -> Literal[True]:
        await self._clock.sleep_until(moment)
        return True

    def _form(self) -> tuple[list[Item], float]:
        """The next batch, and the seconds it may take."""
        self._gathering.tidy(self._drop_expired)
        ready = self._gathering.ready
        if not ready:
            return [], 0.0
        deadline = min(self._deadline(series.timeframe) for series in ready)
        batch = self._gathering.take(min(self._most, self._worker.capacity(deadline / 2)))
        self._waiting -= len(batch)
        self._metrics.queued.labels("due").set(self._waiting)
        return batch, max(deadline, 2 * self._worker.expected(len(batch)))

    def _drop_expired(self, item: Item) -> None:
        """Skip a series' newest bar if its forecast would not be valid any more."""
        end = valid_until(item.due)
        if self._catch_up == "newest" and end <= self._clock.now():
            # It came too late, or it was kept here too long.
            self._skip(item, "stale" if item.arrived >= end else "overrun")

    async def _forecast(self, batch: Sequence[Item], deadline: float) -> None:
        """Decide every bar of the batch."""
        items, windows = await self._windows(batch)
        if not items:
            return
        now = self._clock.now()
        drawn, seconds = await self._worker.forecast(windows, deadline)
        self._batches += 1
        self._metrics.batch_series.observe(len(items))
        self._metrics.computed.observe(seconds)
        _log.debug("batch drawn", batch=self._batches, series=len(items), seconds=round(seconds, 3))
        for item, window, made in zip(items, windows, drawn, strict=True):
            queued = max(0, now - item.due.received)
            self._metrics.batched.observe(queued / 1000)
            result = Result(item.due, window, queued_ms=queued, compute_ms=round(1000 * seconds))
            self._lanes.decide(item, self._filled(result, made))

    async def _windows(self, batch: Sequence[Item]) -> tuple[list[Item], list[Window]]:
        """What to forecast from; bars whose context is gone are skipped."""
        items: list[Item] = []
        windows: list[Window] = []
        for i, item in enumerate(batch, 1):
            window = await self._window(item.due)
            if window is None:
                self._lanes.decide(item, Result(item.due, reason="gap"))
            else:
                items.append(item)
                windows.append(window)
            if i % _TURN == 0:
                await asyncio.sleep(0)
        return items, windows

    def _filled(self, result: Result, made: Drawn | Failed) -> Result:
        if isinstance(made, Drawn):
            return result._replace(outlook=made.outlook, scale=made.scale)
        due = result.due
        _log.warning(
            "forecast failed",
            series=due.series.name,
            origin=due.origin,
            batch=self._batches,
            why=made.reason,
        )
        return result._replace(reason="failed")

    def _skip(self, item: Item, reason: str) -> None:
        """Decide a bar that waits."""
        self._waiting -= 1
        self._lanes.decide(item, Result(item.due, reason=reason))

    async def _tell(self) -> None:
        """Publish what is decided, as soon as its turn in its lane has come."""
        lanes = self._lanes
        while True:
            await lanes.decided.wait()
            lanes.decided.clear()
            while heads := lanes.heads(_CHUNK):
                results = [
                    item.result for item in heads if item.result is not None and not item.withdrawn
                ]
                for outcome in (result.outcome for result in await self._publish(results)):
                    self._metrics.outcomes.labels(outcome.result, outcome.reason).inc()
                lanes.told(len(heads))
                if not lanes.held:
                    self._settled.set()
            if self._worked:
                return

    def _deadline(self, timeframe: Timeframe) -> float:
        if self._batch_deadline is not None:
            return self._batch_deadline
        length = timeframe.milliseconds
        if length is None:  # a month
            return self._longest
        seconds = min(0.0008 * length, self._longest)
        return max(_SHORTEST_DEADLINE_SECONDS, seconds)
