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

from kronos_stream.daemon.alarms import Alarms
from kronos_stream.daemon.backfill import Backfill, Question
from kronos_stream.daemon.due import Due
from kronos_stream.daemon.metrics import Metrics
from kronos_stream.daemon.recall import newest_bars, saved_window, without_outcome
from kronos_stream.daemon.saving import Change, Saving
from kronos_stream.daemon.state import Passed, State
from kronos_stream.market.candle import Bar, Candle, Update
from kronos_stream.market.clock import Clock
from kronos_stream.market.contexts import ContextStore, Window
from kronos_stream.market.effects import (
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
from kronos_stream.market.series import Series
from kronos_stream.market.source import SourceCallbacks, Source, SourceError, VenueRefused
from kronos_stream.market.tape import BarSequencer

_log = structlog.get_logger()

MARGIN = 64
"""Bars kept in memory beyond the lookback, for origins that are forecast late."""

_LONGEST_SLEEP_MS = 30_000
_REFUSED_SECONDS = 3_600.0
"""Until a venue is asked again that will not serve us."""


@dataclass(slots=True, eq=False)
class _Followed:
    """What the desk knows of one series."""

    series: Series
    tape: BarSequencer
    mark: tuple[int, int] | None
    """Origin and revision up to which no bar is due; None before the tape begins."""
    closed: PrometheusCounter
    """Counts its bars."""
    awaited: int = 0
    """Close of the bar that is to be handed on next, 0 where none is known."""
    alarm: int = NEVER


class Desk:
    """The only owner of what is known of each series."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        state: State,
        due: Callable[[Due], None],
        clock: Clock,
        random: Random,
        metrics: Metrics,
        *,
        lookback: int,
        catch_up: Literal["newest", "all"],
        degraded: Literal["forecast", "skip"] = "forecast",
        bury: Callable[[Series | None, str, bytes], None],
        relay: Callable[[Sequence[Passed]], Awaitable[None]] | None = None,
    ) -> None:
        """Where bars come from, are kept, and go.

        due: told each saved bar that asks for a forecast, in order per series.
        catch_up: "newest" begins anew after an absence of more bars than a context has; "all"
            fetches and hands on every one.
        degraded: "skip" gives bars an obstacle while bars of their context are missing.
        bury: told what cannot be: series if known, reason, content.
        relay: where bars are passed on to others, saves them and passes them on, all or none.
        """
        self._sources, self._state, self._due = sources, state, due
        self._clock, self._random, self._metrics = clock, random, metrics
        self._lookback, self._catch_up, self._degraded = lookback, catch_up, degraded
        self._bury, self._relay = bury, relay
        self._capacity = lookback + MARGIN
        self._contexts = ContextStore(self._capacity)
        self._followed: dict[Series, _Followed] = {}
        self._former: dict[Series, tuple[int, int] | None] = {}
        """Marks of series given up: what they had due may not have its outcome yet."""
        self._awaited: Counter[int] = Counter()
        """How many series have their next close when, those not live included."""
        self._alarms: Alarms[_Followed] = Alarms(clock)
        self._saving: Saving[_Followed] = Saving(state, self._write, self._saved)
        self._backfill = Backfill(sources, self._saving.room)
        self._updates: Counter[str] = Counter()
        self._mute: set[str] = set()
        """Venues whose history did not answer when it was asked last."""
        self._calm = asyncio.Event()
        """Set when it may be that nothing is left to do."""

    async def start(self, series: Collection[Series]) -> None:
        """Take over what is known of ``series``; saved bars without an outcome are due again."""
        await self.follow(series)

    async def follow(self, series: Collection[Series]) -> None:
        """Set what is followed, before the sources are told; those kept lose nothing."""
        for gone in self._followed.keys() - set(series):
            one = self._followed.pop(gone)
            self._await(one, 0)
            self._former[gone] = one.mark
            self._contexts.remove(gone)
        for new in sorted(set(series) - self._followed.keys()):
            await self._enter(new)

    def intake(self, venue: str) -> SourceCallbacks:
        """What the source of ``venue`` is given to talk to."""
        followed, counts, apply, arm = self._followed, self._updates, self._apply, self._arm

        def update(update: Update) -> None:
            counts[venue] += 1
            one = followed.get(update.series)
            if one is not None:
                effects = one.tape.update(update.candle, update.closed, update.received)
                if effects:
                    apply(one, effects)
                if one.tape.next_wakeup < one.alarm:
                    arm(one)

        def reject(series: Series | None, reason: str, raw: bytes) -> None:
            self._metrics.rejected.labels(venue).inc()
            self._bury(series, reason, raw)

        def note(event: str) -> None:
            self._metrics.source_events.labels(venue, event).inc()

        return SourceCallbacks(update, reject, note)

    async def run(self) -> None:
        """Save, hand on, ask for what is missing; until cancelled.

        Raises StateError if bars come faster than they can be saved.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._saving.run(self._calm))
            tasks.create_task(self._backfill.run())
            tasks.create_task(self._watch())

    async def window(self, due: Due) -> Window | None:
        """What ``due`` is forecast from; None if that is gone."""
        window = self._contexts.window(due.series, due.origin, self._lookback)
        return window or await saved_window(self._state, due, self._lookback)

    def awaited(self, close: int) -> int:
        """Live series whose bar that closes at ``close``, UTC ms, has not been handed on yet."""
        if not self._awaited[close]:
            return 0
        return sum(one.awaited == close and one.tape.live for one in self._followed.values())

    def _await(self, one: _Followed, close: int) -> None:
        """Expect the bar of that close, 0 for none, to be handed on next."""
        for moment, change in ((one.awaited, -1), (close, 1)):
            if moment:
                self._awaited[moment] += change
                if not self._awaited[moment]:
                    del self._awaited[moment]
        one.awaited = close

    @property
    def next_alarm(self) -> int | None:
        """When there is something to be done even if nothing comes, UTC ms."""
        return self._alarms.next

    async def settled(self) -> None:
        """Return once all that was taken in is saved and handed on, and no question is open."""
        while True:
            self._alarms.ring(self._wake)
            if self._saving.idle and not self._backfill.open:
                return
            self._calm.clear()
            await self._calm.wait()

    @property
    def saving(self) -> Saving[_Followed]:
        """For whoever looks."""
        return self._saving

    @property
    def followed(self) -> Mapping[Series, _Followed]:
        """For whoever looks; not to be changed."""
        return self._followed

    # Taking over.

    async def _enter(self, series: Series) -> None:
        mark = self._former.pop(series, None) or await self._state.mark(series)
        bars = await newest_bars(self._state, series, self._capacity)
        if bars and mark is None:
            mark = bars[-1].candle.time, 0
            await self._state.begin(series, mark[0])
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
        one = self._followed[series] = _Followed(series, tape, mark, counter)
        self._contexts.load(series, bars if enough or anew else (), complete=not enough)
        if mark is not None and (enough or anew):
            for bar in await without_outcome(self._state, series, bars, mark):
                self._hand_on(one, bar)
            one.mark = bars[-1].candle.time, bars[-1].revision
        elif mark is not None and bars and bars[-1].candle.time > mark[0]:
            one.mark = mark[0], NEVER  # a revision of it would be a late one
        if anew:
            _log.info("too long away; begins anew", series=series.name)
            one.mark = None
            self._contexts.load(series, (), complete=True)
        elif enough:
            self._await(one, series.timeframe.after(bars[-1].candle.time, 2))
            await self._pass_on(one, bars, mark)
        self._arm(one)

    def _outdated(self, series: Series, newest: Bar) -> bool:
        end = series.timeframe.after(newest.candle.time, self._capacity)
        return self._catch_up == "newest" and end < self._clock.now()

    # Carrying out what tapes say.

    def _apply(self, one: _Followed, effects: Sequence[Effect]) -> None:
        series = one.series
        for effect in effects:
            if isinstance(effect, (Append, Revise, Confirm, Begin)):
                self._saving.put(one, effect)
            elif isinstance(effect, Fetch):
                self._backfill.ask(Question(series, effect, self._reply(one)))
            elif isinstance(effect, Reject):
                self._metrics.rejected.labels(series.venue).inc()
                self._bury(series, effect.reason, orjson.dumps(effect.candle._asdict()))
            elif isinstance(effect, Gap):
                self._metrics.gaps.labels(series.venue).inc()
                _log.debug("bars are missing", series=series.name, start=effect.start)
            else:
                self._silence(one, effect)

    def _silence(self, one: _Followed, effect: Silence) -> None:
        if effect.silent:
            _log.warning("series is silent", series=one.series.name)
        else:
            _log.info("series is heard again", series=one.series.name)

    def _reply(self, one: _Followed) -> Callable[[Fetch, Sequence[Candle] | SourceError], None]:
        series = one.series
        backfills = self._metrics.backfills

        def reply(asked: Fetch, answer: Sequence[Candle] | SourceError) -> None:
            now = self._clock.now()
            if isinstance(answer, SourceError):
                backfills.labels(series.venue, "failed").inc()
                if series.venue not in self._mute:
                    self._mute.add(series.venue)
                    _log.warning("history cannot be had", series=series.name, why=str(answer))
                refused = isinstance(answer, VenueRefused)
                one.tape.fetch_failed(now, _REFUSED_SECONDS if refused else answer.retry_after)
            else:
                backfills.labels(series.venue, "filled" if answer else "empty").inc()
                if series.venue in self._mute:
                    self._mute.discard(series.venue)
                    _log.info("history can be had again", venue=series.venue)
                effects = one.tape.fetch_completed(asked, answer, now)
                if self._followed.get(series) is one:
                    self._apply(one, effects)
            self._arm(one)
            self._calm.set()

        return reply

    def _arm(self, one: _Followed) -> None:
        """Have the tape woken when it wants to be."""
        wake = one.tape.next_wakeup
        if wake < one.alarm:
            one.alarm = wake
            self._alarms.set(wake, one)

    def _wake(self, one: _Followed, now: int) -> None:
        if one.alarm > now or self._followed.get(one.series) is not one:
            return  # set anew for later, or gone
        one.alarm = NEVER
        if one.tape.next_wakeup <= now:
            self._apply(one, one.tape.tick(now))
        self._arm(one)

    async def _watch(self) -> None:
        """Wake tapes when it is time."""
        while True:
            self._alarms.ring(self._wake)
            self._saving.check()
            self._count()
            self._calm.set()
            await self._alarms.sleep(_LONGEST_SLEEP_MS)

    def _count(self) -> None:
        metrics = self._metrics
        silent: Counter[str] = Counter()
        held: Counter[str] = Counter()
        for one in self._followed.values():
            silent[one.series.venue] += one.tape.silent
            held[one.series.venue] += one.tape.has_gap
        for venue in self._sources:
            metrics.silent.labels(venue).set(silent[venue])
            metrics.held.labels(venue).set(held[venue])
            metrics.updates.labels(venue).inc(self._updates[venue])
        self._updates.clear()
        metrics.queued.labels("unsaved").set(len(self._saving))

    # Handing on what is saved.

    async def _write(self, group: Sequence[tuple[_Followed, Change]]) -> None:
        rows: list[Passed] = []
        marks: dict[_Followed, tuple[int, int] | None] = {}
        for one, change in group:
            mark = marks.get(one, one.mark)
            if isinstance(change, Begin):
                await self._state.begin(one.series, change.origin)
                marks[one] = mark or (change.origin, 0)
                continue
            place = change.bar.candle.time, change.bar.revision
            news = mark is not None and place > mark
            if news:
                marks[one] = place
            rows.append(Passed(one.series, change.bar, news))
        if self._relay is None:
            await self._state.save_bars([row[:2] for row in rows])
        else:
            await self._relay(rows)

    async def _pass_on(
        self, one: _Followed, bars: Sequence[Bar], mark: tuple[int, int] | None
    ) -> None:
        """Pass on bars that were saved while nobody was to have them."""
        if self._relay is None:
            return
        since = await self._state.relayed(one.series)
        rows = [
            Passed(one.series, bar, mark is not None and (bar.candle.time, bar.revision) > mark)
            for bar in bars
            if bar.candle.time > since
        ]
        if rows:
            await self._relay(rows)

    def _saved(self, one: _Followed, effect: Change) -> None:
        if isinstance(effect, Begin):
            one.mark = one.mark or (effect.origin, 0)
            return
        series, bar = one.series, effect.bar
        if self._followed.get(series) is not one:
            return
        if isinstance(effect, Append):
            self._contexts.append(series, bar)
            one.closed.inc()
            if bar.synthetic:
                self._metrics.synthetic.labels(series.venue).inc()
            self._await(one, series.timeframe.after(bar.candle.time, 2))
            self._hand_on(one, bar)
            return
        self._contexts.revise(series, bar)
        if isinstance(effect, Revise):
            age = "newest" if effect.newest else "older"
            self._metrics.revisions.labels(series.venue, age).inc()
            _log.info("bar revised", series=series.name, time=bar.candle.time, age=age)
            if effect.newest:
                self._hand_on(one, bar)

    def _hand_on(self, one: _Followed, bar: Bar) -> None:
        """Let a bar be forecast, if it is not known to have an outcome."""
        place = bar.candle.time, bar.revision
        if one.mark is None or place <= one.mark:
            return
        one.mark = place
        close = one.series.timeframe.after(bar.candle.time)
        # A bar held for its close by our clock came before it; one made up never came.
        received = max(close, bar.received or self._clock.now())
        obstacle = self._contexts.skip_reason(
            one.series, self._lookback, strict=self._degraded == "skip"
        )
        self._due(Due(one.series, *place, close, received, obstacle))
