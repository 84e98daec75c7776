"""The desk keeps the tapes: what venues push is put in order, saved, and handed on to be forecast.

Pushes are taken in at once and never wait. A bar is saved before anything else knows of it. What
is missing is asked for at the venue, exactly and again with growing pauses; a bar becomes
synthetic only where a venue that answers shows later ones.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import structlog

from kronos_stream.daemon.due import Due
from kronos_stream.daemon.metrics import Metrics
from kronos_stream.daemon.state import State
from kronos_stream.market.candle import Bar, Candle, Update
from kronos_stream.market.clock import Clock
from kronos_stream.market.contexts import Contexts, Window, window_of
from kronos_stream.market.series import Series
from kronos_stream.market.source import Intake, Source, SourceError, VenueRefused
from kronos_stream.market.tape import Change, Tape

_log = structlog.get_logger()

LEAST_BARS = 32
"""A series shorter than its lookback is forecast from this many bars on, if it has no more."""

_MARGIN = 64
"""Bars kept beyond the lookback, for origins that wait to be forecast."""

_TICK_SECONDS = 0.2
_SOON_MS = 200
"""A frame may overtake another: so long its bar is awaited before the venue is asked."""

_LONGEST_PAUSE_SECONDS = 30.0
_SHORTEST_PATIENCE_SECONDS, _LONGEST_PATIENCE_SECONDS = 10.0, 120.0
_ANSWERS = 3
"""Answers without a bar before it is held to be none, at least."""

_FETCHES = 16
_FETCH_SECONDS = 120.0
_MOST_UNSAVED = 200_000
_SKEW_MS = 60_000
"""How far our clock may be behind the venue's."""

_LONGEST_MONTH_MS = 31 * 86_400_000
_AUDIT_SECONDS = 600.0
_AUDITED = 60
"""Bars compared with the venue's history every ten minutes: it may have revised them unseen."""


@dataclass(slots=True, eq=False)
class _Follow:
    """A series that is followed."""

    tape: Tape
    source: Source
    mark: tuple[int, int] | None = None
    """Origin and revision of the newest bar that needs no outcome."""
    whole: bool = False
    """Whether the venue's history has been read up to now once."""
    handed: int | None = None
    """Close of the next bar to be handed on, UTC ms, where it is awaited."""
    check: int = 0
    """When to ask the venue if nothing has come, UTC ms."""
    audit: int = 0
    tries: int = 0
    """Answers, or failures to answer, since the last bar."""
    silent: bool = False
    fetching: bool = False
    gap_told: bool = False


class Desk:
    """Drives one tape per series. Used from one event loop."""

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
        catch_up: Literal["newest", "all"] = "newest",
        degraded: Literal["forecast", "skip"] = "forecast",
        bury: Callable[[Series | None, str, bytes], None],
    ) -> None:
        """Nothing runs before :meth:`start` and :meth:`run`.

        due: told of every bar that needs a forecast, in order per series. bury: told of what cannot
        be: series, reason, content.
        """
        self._sources, self._state, self._due = sources, state, due
        self._clock, self._random, self._metrics = clock, random, metrics
        self._lookback, self._catch_up, self._degraded = lookback, catch_up, degraded
        self._bury = bury
        self._follows: dict[Series, _Follow] = {}
        self._contexts = Contexts(lookback + _MARGIN)
        self._expected: Counter[int] = Counter()
        self._unsaved: list[tuple[Series, Bar, Change]] = []
        self._venue_time: dict[str, int] = {}
        self._news, self._wake, self._calm = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._saving = False
        self._fetches = asyncio.Semaphore(_FETCHES)
        self._refused: set[str] = set()

    async def start(self, series: Collection[Series]) -> None:
        """Take over what the state knows of ``series``."""
        for one in sorted(series):
            await self._begin(one)

    async def follow(self, series: Collection[Series]) -> None:
        """Follow exactly these from now on."""
        for one in set(self._follows) - set(series):
            self._expect(self._follows.pop(one), None)
            self._contexts.forget(one)
        for one in sorted(set(series) - set(self._follows)):
            await self._begin(one)
        self._news.set()

    def intake(self, venue: str) -> Intake:
        """What the source of ``venue`` tells us by."""
        updates = self._metrics.updates.labels(venue)
        rejected = self._metrics.rejected.labels(venue)

        def update(update: Update) -> None:
            updates.inc()
            follow = self._follows.get(update.series)
            if follow is None:
                return
            opened = update.candle.time
            if opened > self._venue_time.get(venue, 0):
                self._venue_time[venue] = opened
            if update.closed:
                self._push(follow, update)
            elif follow.tape.glimpse(opened):
                self._hole(follow)

        def reject(series: Series | None, reason: str, raw: bytes) -> None:
            rejected.inc()
            self._bury(series, reason, raw)

        def note(event: str) -> None:
            self._metrics.source_events.labels(venue, event).inc()

        return Intake(update, reject, note)

    async def run(self) -> None:
        """Save, hand on, ask for what is missing; until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._save())
            tasks.create_task(self._watch(tasks))
            tasks.create_task(self._tick())

    async def window(self, due: Due) -> Window | None:
        """What ``due`` is forecast from; None where that is degraded and not to be forecast."""
        window = self._contexts.window(due.series, due.origin, self._lookback)
        if window is None:
            bars = await self._state.load(due.series, self._lookback, due.origin)
            if not bars or bars[-1].candle.time != due.origin:
                return None
            window = window_of(due.series, bars)
        return None if window.reasons and self._degraded == "skip" else window

    def awaited(self, close: int) -> int:
        """Live series whose bar that closes at ``close``, UTC ms, has not come yet."""
        return self._expected[close]

    async def settled(self) -> None:
        """Return once all that was taken in is handed on, and nothing is to be asked for now."""
        while self._busy():
            self._calm.clear()
            self._news.set()
            self._wake.set()
            await self._calm.wait()

    def _busy(self) -> bool:
        now = self._clock.now()
        return bool(
            self._unsaved
            or self._saving
            or any(follow.fetching or follow.check <= now for follow in self._live())
        )

    def _live(self) -> list[_Follow]:
        return [one for one in self._follows.values() if one.tape.series.venue not in self._refused]

    async def _begin(self, series: Series) -> None:
        tape = Tape(series)
        bars = await self._state.load(series, self._lookback + _MARGIN)
        tape.restore(bars)
        for bar in bars:
            self._contexts.append(series, bar)
        follow = _Follow(tape, self._sources[series.venue], await self._state.mark(series))
        self._follows[series] = follow
        now = self._clock.now()
        follow.audit = now + round(_AUDIT_SECONDS * 1000 * (1 + self._random.random()))
        if follow.mark is not None:
            for bar in bars:
                self._hand_on(follow, bar)

    def _push(self, follow: _Follow, update: Update) -> None:
        tape = follow.tape
        try:
            entries = tape.push(update.candle, update.received)
        except ValueError as error:
            self._metrics.rejected.labels(tape.series.venue).inc()
            self._bury(tape.series, str(error), repr(update.candle).encode())
            self._hole(follow)
            return
        for bar, change in entries:
            self._keep(follow, bar, change)
        if tape.holed:
            self._hole(follow)

    def _keep(self, follow: _Follow, bar: Bar, change: Change) -> None:
        series = follow.tape.series
        self._unsaved.append((series, bar, change))
        if len(self._unsaved) > _MOST_UNSAVED:
            raise RuntimeError("the state file cannot keep up: too many bars are not saved yet")
        if change == "new":
            follow.tries = 0
            follow.silent = follow.gap_told = False
            assert follow.tape.next is not None  # noqa: S101 - it has a bar
            closes = series.timeframe.after(follow.tape.next)
            follow.check = closes + round(1000 * follow.source.traits.grace_seconds)
        self._news.set()

    def _hole(self, follow: _Follow) -> None:
        """Something is missing that the venue should have."""
        if not follow.gap_told:
            follow.gap_told = True
            self._metrics.gaps.labels(follow.tape.series.venue).inc()
            _log.info("bars are missing", series=follow.tape.series.name, after=follow.tape.last)
            if not follow.fetching:
                soon = 0 if follow.source.traits.patience_seconds == 0 else _SOON_MS
                follow.check = min(follow.check, self._clock.now() + soon)
                self._wake.set()

    async def _save(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            while self._unsaved:
                entries, self._unsaved = self._unsaved, []
                self._saving = True
                await self._state.save_bars([(series, bar) for series, bar, _ in entries])
                for series, bar, change in entries:
                    self._saved(series, bar, change)
                self._saving = False
            self._calm.set()

    def _saved(self, series: Series, bar: Bar, change: Change) -> None:
        follow = self._follows.get(series)
        if follow is None:
            return
        if change == "new":
            self._contexts.append(series, bar)
            self._metrics.bars.labels(series.venue, str(series.timeframe)).inc()
            if bar.synthetic:
                self._metrics.synthetic.labels(series.venue).inc()
        else:
            self._contexts.revise(series, bar)
            age = "newest" if change == "revised" else "older"
            self._metrics.revisions.labels(series.venue, age).inc()
            _log.info("bar revised", series=series.name, time=bar.candle.time, age=age)
        if change != "revised late":
            self._hand_on(follow, bar)

    def _hand_on(self, follow: _Follow, bar: Bar) -> None:
        series = follow.tape.series
        close = series.timeframe.after(bar.candle.time)
        self._expect(follow, series.timeframe.after(close))
        if follow.mark is None or (bar.candle.time, bar.revision) <= follow.mark:
            return
        follow.mark = (bar.candle.time, bar.revision)
        obstacle = None if self._contexts.length(series) >= self._enough(follow) else "warming up"
        self._due(Due(series, bar.candle.time, bar.revision, close, bar.received, obstacle))

    def _enough(self, follow: _Follow) -> int:
        return min(LEAST_BARS, self._lookback) if follow.whole else self._lookback

    def _expect(self, follow: _Follow, close: int | None) -> None:
        """Await the bar that closes then, or none."""
        if follow.handed is not None:
            self._expected[follow.handed] -= 1
            if not self._expected[follow.handed]:
                del self._expected[follow.handed]
        follow.handed = close
        if close is not None:
            self._expected[close] += 1

    async def _watch(self, tasks: asyncio.TaskGroup) -> None:
        """Ask for what has not come by its time."""
        while True:
            self._wake.clear()
            now = self._clock.now()
            for follow in self._live():
                if follow.fetching:
                    continue
                if follow.check <= now:
                    follow.fetching = True
                    tasks.create_task(self._fetch(follow, *self._missing(follow, now)))
                elif follow.audit <= now and follow.tape.last is not None:
                    follow.fetching = True
                    tasks.create_task(self._audit(follow, now))
            self._gauge()
            self._calm.set()
            await self._wake.wait()

    async def _tick(self) -> None:
        while True:
            await self._clock.sleep(_TICK_SECONDS)
            self._wake.set()

    def _missing(self, follow: _Follow, now: int) -> tuple[int, int]:
        """What to ask for: from the bar that comes next to the last one missing."""
        tape = follow.tape
        if tape.next is not None:
            return tape.next, tape.resumes or now + _SKEW_MS
        step = tape.series.timeframe.milliseconds or _LONGEST_MONTH_MS
        return now - (self._lookback + _MARGIN) * step, now + _SKEW_MS

    async def _fetch(self, follow: _Follow, start: int, end: int) -> None:
        series = follow.tape.series
        backfills = self._metrics.backfills
        try:
            candles = await self._history(follow, start, end)
            await self._answered(follow, candles)
            backfills.labels(series.venue, "answered").inc()
        except VenueRefused as error:
            self._refused.add(series.venue)
            _log.error("venue refuses its history", venue=series.venue, why=str(error))
        except (SourceError, TimeoutError, ValueError) as error:
            backfills.labels(series.venue, "failed").inc()
            follow.tries += 1
            wait = getattr(error, "retry_after", 0.0)
            self._ask_again(follow, wait)
            _log.warning("history cannot be had", series=series.name, why=str(error))
        finally:
            follow.fetching = False
            self._wake.set()

    async def _history(self, follow: _Follow, start: int, end: int) -> Sequence[Candle]:
        async with self._fetches, asyncio.timeout(_FETCH_SECONDS):
            return await follow.source.history(follow.tape.series, start, end)

    async def _answered(self, follow: _Follow, candles: Sequence[Candle]) -> None:
        """Put an answer on the tape; what it still lacks is asked for again or becomes synthetic.

        Raises ValueError where the venue's history holds what cannot be.
        """
        tape, now = follow.tape, self._clock.now()
        for bar, change in tape.answer(candles, now):
            self._keep(follow, bar, change)
        if tape.next is None:
            self._ask_again(follow)
            return
        if not follow.whole:
            follow.whole = True
            if follow.mark is None:
                assert tape.last is not None  # noqa: S101 - next follows from it
                follow.mark = (tape.last, 0)
                await self._state.begin(tape.series, tape.last)
        if tape.holed or follow.check <= now:
            follow.tries += 1
            self._fill(follow, now)
        if tape.holed or follow.check <= now:
            self._ask_again(follow)

    def _fill(self, follow: _Follow, now: int) -> None:
        """Make synthetic what the venue, by all it shows, does not have."""
        tape, traits = follow.tape, follow.source.traits
        patience = self._patience_ms(follow)
        answers = _ANSWERS if patience else 1
        venue_time = self._venue_time.get(tape.series.venue, 0)
        while tape.next is not None and follow.tries >= answers:
            closes = tape.series.timeframe.after(tape.next)
            shown = tape.holed or (not traits.fills_empty and venue_time >= closes + patience)
            if not shown or now < closes + patience:
                return
            for bar, change in tape.fill(closes, now):
                self._keep(follow, bar, change)
            follow.tries = answers

    def _patience_ms(self, follow: _Follow) -> int:
        """How long after its close a bar that the venue does not show is waited for."""
        patience = follow.source.traits.patience_seconds
        if patience is None:
            step = (follow.tape.series.timeframe.milliseconds or _LONGEST_MONTH_MS) / 1000
            patience = min(max(3 * step, _SHORTEST_PATIENCE_SECONDS), _LONGEST_PATIENCE_SECONDS)
        return round(1000 * patience)

    def _ask_again(self, follow: _Follow, wait: float = 0.0) -> None:
        """Nobody waits for this series meanwhile."""
        self._expect(follow, None)
        follow.silent = not follow.tape.holed
        pause = min(0.5 * 2 ** min(follow.tries, 10), _LONGEST_PAUSE_SECONDS)
        pause = max(wait, pause * (0.5 + self._random.random() / 2))
        follow.check = self._clock.now() + round(1000 * pause)

    async def _audit(self, follow: _Follow, now: int) -> None:
        """Compare the newest bars with the venue's history: it may have changed them unseen."""
        tape = follow.tape
        follow.audit = now + round(_AUDIT_SECONDS * 1000)
        assert tape.last is not None  # noqa: S101 - asked before
        step = tape.series.timeframe.milliseconds or _LONGEST_MONTH_MS
        try:
            candles = await self._history(follow, tape.last - _AUDITED * step, tape.last + 1)
            for bar, change in tape.answer(candles, self._clock.now()):
                self._keep(follow, bar, change)
            self._metrics.backfills.labels(tape.series.venue, "audited").inc()
        except (SourceError, TimeoutError, ValueError) as error:
            _log.info("audit put off", series=tape.series.name, why=str(error))
        finally:
            follow.fetching = False
            self._wake.set()

    def _gauge(self) -> None:
        silent: Counter[str] = Counter()
        held: Counter[str] = Counter()
        for follow in self._follows.values():
            silent[follow.tape.series.venue] += follow.silent
            held[follow.tape.series.venue] += follow.tape.holed
        for venue in self._sources:
            self._metrics.silent.labels(venue).set(silent[venue])
            self._metrics.held.labels(venue).set(held[venue])
