"""Intake pipeline: from the venues' updates to saved bars and forecast requests.

Updates go to the sequencer of their series at once. Its effects are queued in order and committed
in batches; a committed bar enters its context and becomes a forecast request. One task serves the
timers of all series.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from random import Random
from typing import Literal

import orjson
import structlog

from kronos_stream.bars.effects import (
    NEVER,
    Append,
    Begin,
    Confirm,
    Effect,
    Fetch,
    Gap,
    Reject,
    Revise,
)
from kronos_stream.bars.sequencer import BarSequencer
from kronos_stream.daemon.intake.backfill import Backfill, BackfillRequest
from kronos_stream.daemon.intake.recovery import bars_not_relayed, load_watermark, newest_bars
from kronos_stream.daemon.intake.save_queue import Relay, SaveQueue, save_changes
from kronos_stream.daemon.intake.saved_bars import SavedBars
from kronos_stream.daemon.intake.series_state import SeriesState
from kronos_stream.daemon.intake.timers import TimerQueue
from kronos_stream.daemon.requests import ForecastRequest
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.source import Source, SourceCallbacks, SourceError, VenueRefused
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_log = structlog.get_logger()

_MAX_SLEEP_MS = 30_000
_YIELD_EVERY = 64
"""Saved changes processed before other tasks run."""
_REFUSED_RETRY_SECONDS = 3_600.0
"""Pause of history requests to a venue that refuses to serve this address."""


class IntakePipeline:
    """Owner of the state of all followed series."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        saved_bars: SavedBars,
        submit: Callable[[ForecastRequest], None],
        clock: Clock,
        random: Random,
        metrics: Metrics,
        *,
        catch_up: Literal["newest", "all"],
        dead_letter: Callable[[Series | None, str, bytes], None],
        relay: Relay | None = None,
    ) -> None:
        """submit: called with each saved bar to forecast from, in order per series.

        catch_up: "newest" starts a series without its old bars after an absence of more bars than
            its context holds; "all" fetches and submits every bar.
        dead_letter: called with series (if known), reason and content of what is rejected.
        relay: saves bars in place of the state file, where they are published to other processes.
        """
        self._sources, self._saved_bars, self._submit = sources, saved_bars, submit
        self._state = saved_bars.state
        self._clock, self._random, self._metrics = clock, random, metrics
        self._catch_up, self._dead_letter, self._relay = catch_up, dead_letter, relay
        self.series_states: dict[Series, SeriesState] = {}
        self._removed_watermarks: dict[Series, tuple[int, int] | None] = {}
        """Watermarks of series no longer followed, whose last outcomes may still be missing."""
        self._timers: TimerQueue[SeriesState] = TimerQueue(clock)
        self.save_queue = SaveQueue(self._state.path)
        self._backfill = Backfill(sources, self.save_queue.wait_for_room, metrics)
        self._update_counts: Counter[str] = Counter()
        self._maybe_idle = asyncio.Event()
        """Set whenever the last piece of work may have been done."""

    async def follow(self, series: Collection[Series]) -> None:
        """Set the followed series, before the sources subscribe to them; others keep all bars.

        New ones are loaded from the state file; their bars without an outcome are submitted again.
        """
        for removed in self.series_states.keys() - set(series):
            one = self.series_states.pop(removed)
            self._removed_watermarks[removed] = one.watermark
            self._saved_bars.remove(one)
        for new in sorted(set(series) - self.series_states.keys()):
            await self._add_series(new)

    def callbacks(self, venue: str) -> SourceCallbacks:
        """Callbacks for the source of ``venue``."""
        followed, counts = self.series_states, self._update_counts
        apply, schedule_timer = self._apply, self._schedule_timer

        def update(update: Update) -> None:
            counts[venue] += 1
            one = followed.get(update.series)
            if one is not None:
                effects = one.sequencer.update(update.candle, update.closed, update.received)
                if effects:
                    apply(one, effects)
                if one.sequencer.next_wakeup < one.timer_at:
                    schedule_timer(one)

        def reject(series: Series | None, reason: str, raw: bytes) -> None:
            self._metrics.rejected.labels(venue).inc()
            self._dead_letter(series, reason, raw)

        def note(event: str) -> None:
            self._metrics.source_events.labels(venue, event).inc()

        return SourceCallbacks(update, reject, note)

    async def run(self) -> None:
        """Save bars, request missing ones and serve timers, until cancelled.

        Raises StateError if bars arrive faster than they can be saved.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._save_bars())
            tasks.create_task(self._backfill.run())
            tasks.create_task(self._run_timers())

    @property
    def next_timer(self) -> int | None:
        """Time of the earliest timer, UTC ms."""
        return self._timers.next

    async def drain(self) -> None:
        """Return once all received bars are saved and submitted, and no backfill is open."""
        while True:
            self._timers.fire(self._on_timer)
            if self.save_queue.idle and not self._backfill.outstanding:
                return
            self._maybe_idle.clear()
            await self._maybe_idle.wait()

    async def _add_series(self, series: Series) -> None:
        saved = self._saved_bars
        bars = await newest_bars(self._state, series, saved.capacity)
        watermark = self._removed_watermarks.pop(series, None) or await load_watermark(
            self._state, series, bars
        )
        complete = len(bars) >= saved.lookback
        outdated = (
            self._catch_up == "newest"
            and bool(bars)
            and series.timeframe.after(bars[-1].candle.time, saved.capacity) < self._clock.now()
        )
        traits = self._sources[series.venue].traits
        sequencer = BarSequencer(
            series.timeframe,
            self._random,
            grace_seconds=traits.grace_seconds,
            history_lag_seconds=traits.history_lag_seconds,
            fills_empty=traits.fills_empty,
            history_bars=saved.capacity,
            bars=() if outdated else bars,
            complete=complete,
        )
        counter = self._metrics.bars.labels(series.venue, str(series.timeframe))
        one = self.series_states[series] = SeriesState(series, sequencer, watermark, counter)
        for request in await saved.load(one, bars, outdated=outdated):
            self._submit(request)
        if complete and not outdated and self._relay is not None:
            rows = await bars_not_relayed(self._state, series, bars, watermark)
            if rows:
                await self._relay(rows)
        self._schedule_timer(one)

    def _apply(self, one: SeriesState, effects: Sequence[Effect]) -> None:
        series = one.series
        for effect in effects:
            if isinstance(effect, (Append, Revise, Confirm, Begin)):
                self.save_queue.put(one, effect)
            elif isinstance(effect, Fetch):
                callback = partial(self._on_backfill, one)
                self._backfill.submit(BackfillRequest(series, effect, callback))
            elif isinstance(effect, Reject):
                self._metrics.rejected.labels(series.venue).inc()
                self._dead_letter(series, effect.reason, orjson.dumps(effect.candle._asdict()))
            elif isinstance(effect, Gap):
                self._metrics.gaps.labels(series.venue).inc()
                _log.debug("bars are missing", series=series.name, start=effect.start)
            elif effect.silent:
                _log.warning("series is silent", series=series.name)
            else:
                _log.info("series has data again", series=series.name)

    def _on_backfill(
        self, one: SeriesState, fetch: Fetch, result: Sequence[Candle] | SourceError
    ) -> None:
        now = self._clock.now()
        if isinstance(result, SourceError):
            refused = isinstance(result, VenueRefused)
            pause = _REFUSED_RETRY_SECONDS if refused else result.retry_after
            one.sequencer.fetch_failed(now, pause)
        else:
            effects = one.sequencer.fetch_completed(fetch, result, now)
            if self.series_states.get(one.series) is one:
                self._apply(one, effects)
        self._schedule_timer(one)
        self._maybe_idle.set()

    def _schedule_timer(self, one: SeriesState) -> None:
        wakeup = one.sequencer.next_wakeup
        if wakeup < one.timer_at:
            one.timer_at = wakeup
            self._timers.schedule(wakeup, one)

    def _on_timer(self, one: SeriesState, now: int) -> None:
        if one.timer_at > now or self.series_states.get(one.series) is not one:
            return  # rescheduled, or no longer followed
        one.timer_at = NEVER
        if one.sequencer.next_wakeup <= now:
            self._apply(one, one.sequencer.tick(now))
        self._schedule_timer(one)

    async def _run_timers(self) -> None:
        while True:
            self._timers.fire(self._on_timer)
            self.save_queue.check_overflow()
            self._update_metrics()
            self._maybe_idle.set()
            await self._timers.sleep(_MAX_SLEEP_MS)

    def _update_metrics(self) -> None:
        metrics = self._metrics
        silent: Counter[str] = Counter()
        held: Counter[str] = Counter()
        for one in self.series_states.values():
            silent[one.series.venue] += one.sequencer.silent
            held[one.series.venue] += one.sequencer.has_gap
        for venue in self._sources:
            metrics.silent_series.labels(venue).set(silent[venue])
            metrics.held_series.labels(venue).set(held[venue])
            metrics.updates.labels(venue).inc(self._update_counts[venue])
        self._update_counts.clear()
        metrics.queue_depth.labels("unsaved").set(len(self.save_queue))

    async def _save_bars(self) -> None:
        while True:
            batch = await self.save_queue.next_batch()
            await save_changes(self._state, batch, self._relay)
            for number, (one, change) in enumerate(batch, 1):
                if isinstance(change, Begin) or self.series_states.get(one.series) is one:
                    request = self._saved_bars.apply(one, change)
                    if request is not None:
                        self._submit(request)
                if number % _YIELD_EVERY == 0:
                    await asyncio.sleep(0)
            self.save_queue.batch_done()
            self._maybe_idle.set()
