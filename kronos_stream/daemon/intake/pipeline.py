"""The desk: drives the tapes, saves what closes, and only then hands it on to be forecast.

Everything a venue says is taken in at once. What follows from it waits in one list, in order, to
be committed together; a bar that is committed goes into its context and becomes due. One timer
serves all series.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import orjson
import structlog
from prometheus_client import Counter as PrometheusCounter

from kronos_stream.bars.contexts import ContextStore
from kronos_stream.bars.window import Window
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
    Silence,
)
from kronos_stream.bars.sequencer import BarSequencer
from kronos_stream.daemon.intake.backfill import Backfill, BackfillRequest
from kronos_stream.daemon.intake.recovery import bars_without_outcome, load_window, newest_bars
from kronos_stream.daemon.intake.save_queue import Change, SaveQueue
from kronos_stream.daemon.intake.timers import TimerQueue
from kronos_stream.daemon.requests import ForecastRequest
from kronos_stream.daemon.storage.state import PublishedBar, State
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.source import Source, SourceCallbacks, SourceError, VenueRefused
from kronos_stream.market.candle import Bar, Candle, Update
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_log = structlog.get_logger()

CONTEXT_MARGIN = 64
"""Bars kept in memory beyond the lookback, for origins that are forecast late."""

_MAX_SLEEP_MS = 30_000
_REFUSED_RETRY_SECONDS = 3_600.0
"""Until a venue is asked again that will not serve us."""


@dataclass(slots=True, eq=False)
class _SeriesState:
    """What the desk knows of one series."""

    series: Series
    sequencer: BarSequencer
    watermark: tuple[int, int] | None
    """Origin and revision up to which no bar is due; None before the tape begins."""
    closed_bars: PrometheusCounter
    """Counts its bars."""
    next_close: int = 0
    """Close of the bar that is to be handed on next, 0 where none is known."""
    timer_at: int = NEVER


class IntakePipeline:
    """The only owner of what is known of each series."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        state: State,
        submit: Callable[[ForecastRequest], None],
        clock: Clock,
        random: Random,
        metrics: Metrics,
        *,
        lookback: int,
        catch_up: Literal["newest", "all"],
        degraded: Literal["forecast", "skip"] = "forecast",
        dead_letter: Callable[[Series | None, str, bytes], None],
        relay: Callable[[Sequence[PublishedBar]], Awaitable[None]] | None = None,
    ) -> None:
        """Where bars come from, are kept, and go.

        due: told each saved bar that asks for a forecast, in order per series.
        catch_up: "newest" begins anew after an absence of more bars than a context has; "all"
            fetches and hands on every one.
        degraded: "skip" gives bars an obstacle while bars of their context are missing.
        bury: told what cannot be: series if known, reason, content.
        relay: where bars are passed on to others, saves them and passes them on, all or none.
        """
        self._sources, self._state, self._submit = sources, state, submit
        self._clock, self._random, self._metrics = clock, random, metrics
        self._lookback, self._catch_up, self._degraded = lookback, catch_up, degraded
        self._dead_letter, self._relay = dead_letter, relay
        self._capacity = lookback + CONTEXT_MARGIN
        self._contexts = ContextStore(self._capacity)
        self._series: dict[Series, _SeriesState] = {}
        self._removed_watermarks: dict[Series, tuple[int, int] | None] = {}
        """Marks of series given up: what they had due may not have its outcome yet."""
        self._expected_closes: Counter[int] = Counter()
        """How many series have their next close when, those not live included."""
        self._timers: TimerQueue[_SeriesState] = TimerQueue(clock)
        self._save_queue: SaveQueue[_SeriesState] = SaveQueue(state, self._write, self._on_saved)
        self._backfill = Backfill(sources, self._save_queue.wait_for_room)
        self._update_counts: Counter[str] = Counter()
        self._failing_venues: set[str] = set()
        """Venues whose history did not answer when it was asked last."""
        self._maybe_idle = asyncio.Event()
        """Set when it may be that nothing is left to do."""

    async def start(self, series: Collection[Series]) -> None:
        """Take over what is known of ``series``; saved bars without an outcome are due again."""
        await self.follow(series)

    async def follow(self, series: Collection[Series]) -> None:
        """Set what is followed, before the sources are told; those kept lose nothing."""
        for gone in self._series.keys() - set(series):
            one = self._series.pop(gone)
            self._expect_close(one, 0)
            self._removed_watermarks[gone] = one.watermark
            self._contexts.remove(gone)
        for new in sorted(set(series) - self._series.keys()):
            await self._add_series(new)

    def callbacks(self, venue: str) -> SourceCallbacks:
        """What the source of ``venue`` is given to talk to."""
        followed, counts, apply, arm = (
            self._series,
            self._update_counts,
            self._apply,
            self._schedule_timer,
        )

        def update(update: Update) -> None:
            counts[venue] += 1
            one = followed.get(update.series)
            if one is not None:
                effects = one.sequencer.update(update.candle, update.closed, update.received)
                if effects:
                    apply(one, effects)
                if one.sequencer.next_wakeup < one.timer_at:
                    arm(one)

        def reject(series: Series | None, reason: str, raw: bytes) -> None:
            self._metrics.rejected.labels(venue).inc()
            self._dead_letter(series, reason, raw)

        def note(event: str) -> None:
            self._metrics.source_events.labels(venue, event).inc()

        return SourceCallbacks(update, reject, note)

    async def run(self) -> None:
        """Save, hand on, ask for what is missing; until cancelled.

        Raises StateError if bars come faster than they can be saved.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._save_queue.run(self._maybe_idle))
            tasks.create_task(self._backfill.run())
            tasks.create_task(self._run_timers())

    async def window(self, request: ForecastRequest) -> Window | None:
        """What ``due`` is forecast from; None if that is gone."""
        window = self._contexts.window(request.series, request.origin, self._lookback)
        return window or await load_window(self._state, request, self._lookback)

    def outstanding_bars(self, close: int) -> int:
        """Live series whose bar that closes at ``close``, UTC ms, has not been handed on yet."""
        if not self._expected_closes[close]:
            return 0
        return sum(one.next_close == close and one.sequencer.live for one in self._series.values())

    def _expect_close(self, one: _SeriesState, close: int) -> None:
        """Expect the bar of that close, 0 for none, to be handed on next."""
        for moment, change in ((one.next_close, -1), (close, 1)):
            if moment:
                self._expected_closes[moment] += change
                if not self._expected_closes[moment]:
                    del self._expected_closes[moment]
        one.next_close = close

    @property
    def next_timer(self) -> int | None:
        """When there is something to be done even if nothing comes, UTC ms."""
        return self._timers.next

    async def drain(self) -> None:
        """Return once all that was taken in is saved and handed on, and no question is open."""
        while True:
            self._timers.fire(self._on_timer)
            if self._save_queue.idle and not self._backfill.outstanding:
                return
            self._maybe_idle.clear()
            await self._maybe_idle.wait()

    @property
    def save_queue(self) -> SaveQueue[_SeriesState]:
        """For whoever looks."""
        return self._save_queue

    @property
    def series_states(self) -> Mapping[Series, _SeriesState]:
        """For whoever looks; not to be changed."""
        return self._series

    # Taking over.

    async def _add_series(self, series: Series) -> None:
        mark = self._removed_watermarks.pop(series, None) or await self._state.watermark(series)
        bars = await newest_bars(self._state, series, self._capacity)
        if bars and mark is None:
            mark = bars[-1].candle.time, 0
            await self._state.init_watermark(series, mark[0])
        enough = len(bars) >= self._lookback
        anew = bool(bars) and self._outdated(series, bars[-1])
        traits = self._sources[series.venue].traits
        tape = BarSequencer(
            series.timeframe,
            self._random,
            grace_seconds=traits.grace_seconds,
            history_lag_seconds=traits.history_lag_seconds,
            fills_empty=traits.fills_empty,
            history_bars=self._capacity,
            bars=() if anew else bars,
            complete=enough,
        )
        counter = self._metrics.bars.labels(series.venue, str(series.timeframe))
        one = self._series[series] = _SeriesState(series, tape, mark, counter)
        self._contexts.load(series, bars if enough or anew else (), complete=not enough)
        if mark is not None and (enough or anew):
            for bar in await bars_without_outcome(self._state, series, bars, mark):
                self._request_forecast(one, bar)
            one.watermark = bars[-1].candle.time, bars[-1].revision
        elif mark is not None and bars and bars[-1].candle.time > mark[0]:
            one.watermark = mark[0], NEVER  # a revision of it would be a late one
        if anew:
            _log.info("too long away; begins anew", series=series.name)
            one.watermark = None
            self._contexts.load(series, (), complete=True)
        elif enough:
            self._expect_close(one, series.timeframe.after(bars[-1].candle.time, 2))
            await self._relay_saved(one, bars, mark)
        self._schedule_timer(one)

    def _outdated(self, series: Series, newest: Bar) -> bool:
        end = series.timeframe.after(newest.candle.time, self._capacity)
        return self._catch_up == "newest" and end < self._clock.now()

    # Carrying out what tapes say.

    def _apply(self, one: _SeriesState, effects: Sequence[Effect]) -> None:
        series = one.series
        for effect in effects:
            if isinstance(effect, (Append, Revise, Confirm, Begin)):
                self._save_queue.put(one, effect)
            elif isinstance(effect, Fetch):
                self._backfill.submit(BackfillRequest(series, effect, self._backfill_callback(one)))
            elif isinstance(effect, Reject):
                self._metrics.rejected.labels(series.venue).inc()
                self._dead_letter(series, effect.reason, orjson.dumps(effect.candle._asdict()))
            elif isinstance(effect, Gap):
                self._metrics.gaps.labels(series.venue).inc()
                _log.debug("bars are missing", series=series.name, start=effect.start)
            else:
                self._log_silence(one, effect)

    def _log_silence(self, one: _SeriesState, effect: Silence) -> None:
        if effect.silent:
            _log.warning("series is silent", series=one.series.name)
        else:
            _log.info("series is heard again", series=one.series.name)

    def _backfill_callback(
        self, one: _SeriesState
    ) -> Callable[[Fetch, Sequence[Candle] | SourceError], None]:
        series = one.series
        backfills = self._metrics.backfills

        def reply(asked: Fetch, answer: Sequence[Candle] | SourceError) -> None:
            now = self._clock.now()
            if isinstance(answer, SourceError):
                backfills.labels(series.venue, "failed").inc()
                if series.venue not in self._failing_venues:
                    self._failing_venues.add(series.venue)
                    _log.warning("history cannot be had", series=series.name, why=str(answer))
                refused = isinstance(answer, VenueRefused)
                one.sequencer.fetch_failed(
                    now, _REFUSED_RETRY_SECONDS if refused else answer.retry_after
                )
            else:
                backfills.labels(series.venue, "filled" if answer else "empty").inc()
                if series.venue in self._failing_venues:
                    self._failing_venues.discard(series.venue)
                    _log.info("history can be had again", venue=series.venue)
                effects = one.sequencer.fetch_completed(asked, answer, now)
                if self._series.get(series) is one:
                    self._apply(one, effects)
            self._schedule_timer(one)
            self._maybe_idle.set()

        return reply

    def _schedule_timer(self, one: _SeriesState) -> None:
        """Have the tape woken when it wants to be."""
        wake = one.sequencer.next_wakeup
        if wake < one.timer_at:
            one.timer_at = wake
            self._timers.schedule(wake, one)

    def _on_timer(self, one: _SeriesState, now: int) -> None:
        if one.timer_at > now or self._series.get(one.series) is not one:
            return  # set anew for later, or gone
        one.timer_at = NEVER
        if one.sequencer.next_wakeup <= now:
            self._apply(one, one.sequencer.tick(now))
        self._schedule_timer(one)

    async def _run_timers(self) -> None:
        """Wake tapes when it is time."""
        while True:
            self._timers.fire(self._on_timer)
            self._save_queue.check_overflow()
            self._update_metrics()
            self._maybe_idle.set()
            await self._timers.sleep(_MAX_SLEEP_MS)

    def _update_metrics(self) -> None:
        metrics = self._metrics
        silent: Counter[str] = Counter()
        held: Counter[str] = Counter()
        for one in self._series.values():
            silent[one.series.venue] += one.sequencer.silent
            held[one.series.venue] += one.sequencer.has_gap
        for venue in self._sources:
            metrics.silent_series.labels(venue).set(silent[venue])
            metrics.held_series.labels(venue).set(held[venue])
            metrics.updates.labels(venue).inc(self._update_counts[venue])
        self._update_counts.clear()
        metrics.queue_depth.labels("unsaved").set(len(self._save_queue))

    # Handing on what is saved.

    async def _write(self, group: Sequence[tuple[_SeriesState, Change]]) -> None:
        rows: list[PublishedBar] = []
        marks: dict[_SeriesState, tuple[int, int] | None] = {}
        for one, change in group:
            mark = marks.get(one, one.watermark)
            if isinstance(change, Begin):
                await self._state.init_watermark(one.series, change.origin)
                marks[one] = mark or (change.origin, 0)
                continue
            place = change.bar.candle.time, change.bar.revision
            news = mark is not None and place > mark
            if news:
                marks[one] = place
            rows.append(PublishedBar(one.series, change.bar, news))
        if self._relay is None:
            await self._state.save_bars([row[:2] for row in rows])
        else:
            await self._relay(rows)

    async def _relay_saved(
        self, one: _SeriesState, bars: Sequence[Bar], watermark: tuple[int, int] | None
    ) -> None:
        """Pass on bars that were saved while nobody was to have them."""
        if self._relay is None:
            return
        since = await self._state.last_relayed(one.series)
        rows = [
            PublishedBar(
                one.series,
                bar,
                watermark is not None and (bar.candle.time, bar.revision) > watermark,
            )
            for bar in bars
            if bar.candle.time > since
        ]
        if rows:
            await self._relay(rows)

    def _on_saved(self, one: _SeriesState, effect: Change) -> None:
        if isinstance(effect, Begin):
            one.watermark = one.watermark or (effect.origin, 0)
            return
        series, bar = one.series, effect.bar
        if self._series.get(series) is not one:
            return
        if isinstance(effect, Append):
            self._contexts.append(series, bar)
            one.closed_bars.inc()
            if bar.synthetic:
                self._metrics.synthetic_bars.labels(series.venue).inc()
            self._expect_close(one, series.timeframe.after(bar.candle.time, 2))
            self._request_forecast(one, bar)
            return
        self._contexts.revise(series, bar)
        if isinstance(effect, Revise):
            age = "newest" if effect.newest else "older"
            self._metrics.revisions.labels(series.venue, age).inc()
            _log.info("bar revised", series=series.name, time=bar.candle.time, age=age)
            if effect.newest:
                self._request_forecast(one, bar)

    def _request_forecast(self, one: _SeriesState, bar: Bar) -> None:
        """Let a bar be forecast, if it is not known to have an outcome."""
        place = bar.candle.time, bar.revision
        if one.watermark is None or place <= one.watermark:
            return
        one.watermark = place
        close = one.series.timeframe.after(bar.candle.time)
        # A bar held for its close by our clock came before it; one made up never came.
        received = max(close, bar.received or self._clock.now())
        obstacle = self._contexts.skip_reason(
            one.series, self._lookback, strict=self._degraded == "skip"
        )
        self._submit(ForecastRequest(one.series, *place, close, received, obstacle))
