"""The tape of one series: its closed bars, each once and in order, whatever the venue's pushes do.

A tape takes in what is pushed, what the venue's history answers, and the passing of time, and says
what follows (:mod:`kronos_stream.bars.effects`). It reads no clock and does no I/O. It knows
which bars must have closed by now and which of them it lacks; those it asks for.

* A bar counts as closed when the venue says so, never before its close by our clock. Without that
  word it is asked for once a later bar shows up, or its grace is over.
* Bars behind a hole are held. What the venue's history, asked twice, does not have some seconds
  after its close, while later bars show the venue alive, does not exist: a flat bar without volume
  takes its place. Where a venue sends nothing when nothing trades, later bars are not required.
* A bar on the tape changes only as the history says (:mod:`kronos_stream.bars.corrections`).
* While the history cannot be had, nothing can be known. Once patience ends, bars held behind a
  hole go on all the same; those in it are owed: made up for now, and asked for until it answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from kronos_stream.bars.backfill_policy import BackfillPolicy
from kronos_stream.bars.bar_log import BarLog
from kronos_stream.bars.corrections import PendingCorrections
from kronos_stream.bars.effects import NEVER, Begin, Effect, Fetch, Gap, Reject, Silence
from kronos_stream.bars.missing import MissingBars
from kronos_stream.bars.push_timing import PushTiming
from kronos_stream.bars.validation import CandleValidator
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.grid import Grid
from kronos_stream.market.timeframe import Timeframe

_EARLY_MS = 500
"""A bar said to be closed earlier than that is compared with what the history says of it."""

_SETTLE_MS = 200
"""Pushes cross on their way: the word missing now may arrive within that."""

_LAG_MS, _REQUIRED_ANSWERS = 5_000, 2
"""How long the history may not know of a bar or its change yet, and how often it is asked at
least, before something does not exist or did not change; Traits.patience_seconds goes first."""

_MAX_QUIET_BARS = 60
"""After so many flat bars in a row without a sign of life a quiet symbol is a silent one."""

_RECHECK_MS = 60_000
"""After that a bar is asked for again that a venue should have had."""

_AUDIT_BARS, _AUDIT_DELAY_MS = 90, 15_000
"""Bars on the tape that an audit asks for, and how long it waits for other questions."""

_MAX_PENDING = 256
"""Pushed bars held at most; what comes beyond is missing, and asked for."""

_MAX_PLACEHOLDERS = 1_000
"""Bars owed that are asked for at a time; bars made up at a time."""


class BarSequencer:
    """The ledger of one series, and what is done to keep it. All times are UTC ms."""

    def __init__(
        self,
        timeframe: Timeframe,
        random: Random,
        *,
        grace_seconds: float,
        history_lag_seconds: float | None,
        fills_empty: bool,
        history_bars: int,
        bars: Sequence[Bar] = (),
        complete: bool = False,
    ) -> None:
        """A tape that goes on from ``known``, contiguous bars.

        grace_seconds, patience_seconds, fills_empty: as of the venue's Traits.
        history: bars to begin with, asked for first unless ``whole`` says that ``known`` will do;
            otherwise ``known`` is appended anew in its place among them.
        """
        self.next_wakeup = 0
        """When :meth:`tick` has something to do."""
        self.silent = False
        """Whether neither pushes nor the history have the bar that is due."""
        self.live = complete and bool(bars)
        """Whether the next bar can be expected in time: none is missing, and it is not silent."""
        self._grid = Grid(timeframe)
        self._validator = CandleValidator(self._grid)
        self._lag = _LAG_MS if history_lag_seconds is None else round(history_lag_seconds * 1000)
        answers, settle = (_REQUIRED_ANSWERS, _SETTLE_MS) if self._lag else (1, 0)
        self._corrections = PendingCorrections(settle, self._lag, answers)
        self._missing = MissingBars(answers, history_bars)
        self._bar_log = BarLog(self._grid, self._corrections, self._missing)
        self._pending = self._bar_log.pending
        self._timing = PushTiming(round(grace_seconds * 1000), settle)
        self._backfill = BackfillPolicy(timeframe.min_milliseconds, random)
        self._fills_empty, self._history_bars = fills_empty, history_bars
        self._last_gap = -1
        self._start_known = self._start_requested = complete and bool(bars)
        """Whether the first bar is known, or that there is none yet; whether that was asked."""
        if self._start_known:
            self._bar_log.restore(bars)
        else:
            self._pending.update((bar.candle.time, bar) for bar in bars)

    @property
    def next(self) -> int | None:
        """Open of the bar that the tape waits for; None until a first one is known."""
        return self._bar_log.next

    @property
    def has_gap(self) -> bool:
        """Whether bars are held because those before them are missing."""
        return self._bar_log.has_gap

    @property
    def pending_count(self) -> int:
        """Bars that wait for those before them."""
        return len(self._pending) if self.has_gap else 0

    @property
    def placeholder_count(self) -> int:
        """Bars that are made up for now, for the history could not be had."""
        return len(self._missing)

    @property
    def last(self) -> Bar | None:
        """The newest bar on it."""
        recent = self._bar_log.recent
        return recent[next(reversed(recent))] if recent else None

    def update(self, candle: Candle, closed: bool, received: int) -> Sequence[Effect]:  # noqa: FBT001
        """Take in a push: a bar so far, or the venue's last word on it."""
        time, ledger, pulse = candle.time, self._bar_log, self._timing
        if time == pulse.newest and not closed and not self._pending and not self.silent:
            # Nearly all pushes end here. Their values mean nothing yet, so nobody judges them.
            pulse.last_push = received
            return ()
        effects: list[Effect] = []
        fault = self._validator.invalid_reason(candle, received, ledger.anchor, closed=closed)
        if fault is not None:
            self._validator.reject(candle, fault, effects)
            return effects
        pulse.record_push(time, received)
        if self._start_known and ledger.next is None:
            ledger.next = time
        if ledger.next is None or time >= ledger.next:
            self._set_silent(effects, silent=False)
            self._accept_push(candle, received, effects, closed=closed)
            self._drain(received, effects)
        elif closed:
            ledger.compare(candle, received, effects)
        else:
            ledger.flag_mismatch(candle, received)
        self._schedule_wakeup()
        return effects

    def tick(self, now: int) -> Sequence[Effect]:
        """Do what time has made due; :attr:`wake` says when again."""
        effects: list[Effect] = []
        self._drain(now, effects)
        if now >= self._backfill.hold_deadline():
            self._append_placeholders(now, effects)
        if self._backfill.allowed(now):
            if not self._start_requested:
                self._start_requested = True
                effects.append(Begin(self._grid.before(now)))
            asked = self._backfill.pending = self._with_audit(now, self._next_request(now))
            if asked is not None:
                self._report_gap(asked, effects)
                effects.append(asked)
        self._schedule_wakeup()
        return effects

    def fetch_failed(self, now: int, retry_after: float = 0.0) -> None:
        """What was asked for was not answered; not to be asked within ``retry_after`` seconds."""
        self._backfill.failed(now, retry_after)
        self._schedule_wakeup()

    def fetch_completed(
        self, request: Fetch, candles: Sequence[Candle], now: int
    ) -> Sequence[Effect]:
        """The venue's closed bars of the range asked for."""
        self._backfill.succeeded()
        ledger = self._bar_log
        effects: list[Effect] = []
        given = self._validator.filter_valid(request, candles, now, ledger.anchor, effects)
        if not self._start_known:
            self._set_start(given)
        before = ledger.next, len(self._missing)
        ledger.resolve_corrections(request, given, now, effects)
        for candle in given.values():
            if ledger.next is not None and candle.time < ledger.next:
                ledger.compare(candle, now, effects)
            else:
                ledger.add_pending(Bar(candle, received=now))
        ledger.confirm_placeholders(request, given, now, effects)
        self._drain(now, effects)
        self._fill_gaps(request, now, effects)
        if self._next_request(now) is None or before != (ledger.next, len(self._missing)):
            self._backfill.reset_backoff()
        else:
            self._backfill.back_off(now)
        self._detect_silence(effects)
        self._schedule_wakeup()
        return effects

    # What is put on the tape.

    def _set_start(self, given: dict[int, Candle]) -> None:
        """Begin where the venue's history, or what is known of it, begins."""
        self._start_known = True
        times = given.keys() | self._pending.keys()
        if times:
            self._bar_log.next = min(times)
        elif self._timing.newest >= 0:
            self._bar_log.next = self._timing.newest

    def _accept_push(
        self, candle: Candle, now: int, effects: list[Effect], *, closed: bool
    ) -> None:
        """Take in a push of a bar that is not on the tape."""
        time = candle.time
        early = self._grid.after(time) - now
        if not closed:
            if early > 0 and time in self._pending:
                self._corrections.discard(time)
                lie = self._pending.pop(time).candle
                effects.append(Reject(lie, "said to be closed, and then pushed as open"))
        elif early > 0:
            self._pending[time] = Bar(candle, received=now)
            if early > _EARLY_MS:
                self._corrections.check(candle, now)
        elif time == self._bar_log.next or len(self._pending) < _MAX_PENDING:
            if time == self._bar_log.next:
                self._timing.record_delay(-early)
            self._bar_log.add_pending(Bar(candle, received=now))

    def _drain(self, now: int, effects: list[Effect]) -> None:
        before = self._bar_log.next
        self._bar_log.append_ready(now, effects)
        if self._bar_log.next != before:
            self._backfill.reset_backoff()
            self._set_silent(effects, silent=False)

    def _fill_gaps(self, asked: Fetch, now: int, effects: list[Effect]) -> None:
        """Put flat bars in the place of those that do not exist."""
        ledger, debts = self._bar_log, self._missing
        for time in ledger.missing_opens(asked.end):
            if time >= asked.start:
                debts.record_absence(time)
        while ledger.next is not None and ledger.next not in self._pending:
            time, close = ledger.next, self._grid.after(ledger.next)
            goes_on = bool(self._pending) or self._timing.newest > time or self._quiet_allowed
            if not goes_on or not debts.confirmed(time) or close + self._lag > now:
                return
            ledger.append_flat(time, close, now, effects)
            if self._fills_empty:  # odd: it should have had the bar
                self._backfill.schedule_audit(now + _RECHECK_MS)
            self._drain(now, effects)

    @property
    def _quiet_allowed(self) -> bool:
        return not self._fills_empty and self._bar_log.trailing_flat_bars < _MAX_QUIET_BARS

    def _append_placeholders(self, now: int, effects: list[Effect]) -> None:
        """Go on without the missing bars."""
        ledger = self._bar_log
        for _ in range(_MAX_PLACEHOLDERS):
            time = ledger.next
            if time is None or not ledger.has_gap or (close := self._grid.after(time)) > now:
                return
            ledger.append_flat(time, close, 0, effects)
            self._drain(now, effects)

    # What is asked for, and when.

    def _next_request(self, now: int) -> Fetch | None:
        """What is to be asked for by now, as one range."""
        time = self._bar_log.next
        if time is None:
            first = max(0, self._grid.before(now, self._history_bars))
            return None if self._start_known else Fetch(first, now)
        missing = list(self._bar_log.missing_opens(self._timing.closed_by(now)))
        times = [*self._corrections.ready(now, time), *missing[:1], *missing[-1:]]
        times = times or self._missing.oldest(_MAX_PLACEHOLDERS)
        return Fetch(min(times), self._grid.after(max(times))) if times else None

    def _with_audit(self, now: int, wanted: Fetch | None) -> Fetch | None:
        """What is wanted; from time to time the newest bars on the tape, or these with it."""
        time, first = self._bar_log.next, self._bar_log.newest(_AUDIT_BARS)
        late = _AUDIT_DELAY_MS if wanted is not None else 0
        if time is None or first is None or not self._backfill.audit_due(now - late):
            return wanted
        return Fetch(first, time if wanted is None else max(wanted.end, time))

    def _report_gap(self, asked: Fetch, effects: list[Effect]) -> None:
        time = self._bar_log.next
        if time is None or time == self._last_gap or not asked.start <= time < asked.end:
            return
        if self._pending or self._timing.newest > time:
            self._last_gap = time
            effects.append(Gap(time, asked.end))

    def _detect_silence(self, effects: list[Effect]) -> None:
        """Notice that neither pushes nor the history have anything of the bar that is due."""
        time, pulse = self._bar_log.next, self._timing
        if time is None or self._pending or pulse.newest > time or self._quiet_allowed:
            return
        if pulse.last_push < self._grid.after(time) and self._missing.confirmed(time):
            self._set_silent(effects, silent=True)

    def _set_silent(self, effects: list[Effect], *, silent: bool) -> None:
        if silent != self.silent:
            self.silent = silent
            effects.append(Silence(silent))

    def _schedule_wakeup(self) -> None:
        """Set :attr:`wake` to the first moment at which anything is to be done."""
        time, asking = self._bar_log.next, self._backfill
        self.live = time is not None and not self.silent and not self._bar_log.has_gap
        if time is None:
            self.next_wakeup = NEVER if self._start_known else asking.earliest(0)
            return
        close = self._grid.after(time)
        due = 0 if self._missing else min(asking.next_audit, self._corrections.next_due(time))
        if time not in self._pending:
            due = min(due, self._timing.deadline(time, close))
        wake = asking.earliest(due)
        if time in self._pending:
            wake = min(wake, close)
        elif self._pending:
            wake = min(wake, max(close, asking.hold_deadline()))
        self.next_wakeup = wake
