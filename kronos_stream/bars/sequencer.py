"""Sequencer of one series: confirms its closed bars, each once and in order.

It consumes pushes, answers of the venue's history and the passing of time, and returns effects
(:mod:`kronos_stream.bars.effects`). It reads no clock and does no I/O.

* A bar is closed when the venue reports it closed, never before its close by the local clock.
  Without a closing push it is requested from the history once a later bar is pushed, or its grace
  period is over.
* Bars behind a gap are held. A bar that two answers of the history lack, some seconds after its
  close, does not exist if later bars show that the venue is alive: a flat bar without volume takes
  its place. Where a venue sends nothing when nothing trades, later bars are not required.
* Only the history can change a confirmed bar (:mod:`kronos_stream.bars.corrections`).
* While the history cannot be reached, bars behind a gap are held for a while, then confirmed with
  placeholders for the missing ones, which are requested until the history answers.
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
from kronos_stream.market.timeframe import Timeframe

_EARLY_MS = 500
"""A bar reported closed earlier than this before its close is compared with the history."""

_SETTLE_MS = 200
"""Pushes may overtake each other: a missing one may still arrive within this time."""

_LAG_MS, _REQUIRED_ANSWERS = 5_000, 2
"""Lag of the history behind pushes (``Traits.history_lag_seconds`` takes precedence), and answers
required until a bar does not exist or has not changed."""

_MAX_QUIET_BARS = 60
"""Synthetic bars in a row without a push after which a symbol counts as silent."""

_RECHECK_MS = 60_000
"""Delay until a bar that the venue should have had is requested again."""

_AUDIT_BARS, _AUDIT_DELAY_MS = 90, 15_000
"""Confirmed bars that an audit requests, and how long it waits for other requests."""

_MAX_PENDING = 256
"""Limit of held bars; further ones are dropped and requested later."""

_MAX_PLACEHOLDERS = 1_000
"""Placeholders requested, or created, at a time."""


class BarSequencer:
    """Ordering and gap machine of one series. All times are UTC ms."""

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
        """Continue after ``bars``, contiguous.

        grace_seconds, history_lag_seconds, fills_empty: the venue's Traits.
        history_bars: number of bars to start with, requested first unless ``complete`` says that
            ``bars`` suffice; otherwise ``bars`` are confirmed again among them.
        """
        self.next_wakeup = 0
        """Time of the next :meth:`tick`."""
        self.silent = False
        """True if neither pushes nor the history have the bar that is due."""
        self.live = complete and bool(bars)
        """True if the next bar is expected in time: no gap, and not silent."""
        self._timeframe = timeframe
        self._validator = CandleValidator(timeframe)
        self._lag = _LAG_MS if history_lag_seconds is None else round(history_lag_seconds * 1000)
        answers, settle = (_REQUIRED_ANSWERS, _SETTLE_MS) if self._lag else (1, 0)
        self._corrections = PendingCorrections(settle, self._lag, answers)
        self._missing = MissingBars(answers, history_bars)
        self._bar_log = BarLog(timeframe, self._corrections, self._missing)
        self._pending = self._bar_log.pending
        self._timing = PushTiming(round(grace_seconds * 1000), settle)
        self._backfill = BackfillPolicy(timeframe.min_milliseconds, random)
        self._fills_empty, self._history_bars = fills_empty, history_bars
        self._last_gap = -1
        self._start_known = self._start_requested = complete and bool(bars)
        """Whether the first bar is known (or known not to exist), and whether it was requested."""
        if self._start_known:
            self._bar_log.restore(bars)
        else:
            self._pending.update((bar.candle.time, bar) for bar in bars)

    @property
    def next(self) -> int | None:
        """Open of the next bar to confirm; None until a first one is known."""
        return self._bar_log.next

    @property
    def has_gap(self) -> bool:
        """True if bars wait because earlier ones are missing."""
        return self._bar_log.has_gap

    @property
    def pending_count(self) -> int:
        """Number of bars behind a gap."""
        return len(self._pending) if self.has_gap else 0

    @property
    def placeholder_count(self) -> int:
        """Number of bars replaced by placeholders."""
        return len(self._missing)

    @property
    def last(self) -> Bar | None:
        """The newest confirmed bar."""
        recent = self._bar_log.recent
        return recent[next(reversed(recent))] if recent else None

    def update(self, candle: Candle, closed: bool, received: int) -> Sequence[Effect]:  # noqa: FBT001
        """Process a push of an open or closed bar."""
        time, log, timing = candle.time, self._bar_log, self._timing
        if time == timing.newest and not closed and not self._pending and not self.silent:
            # Fast path of nearly all pushes; values of an open bar are not validated.
            timing.last_push = received
            return ()
        effects: list[Effect] = []
        reason = self._validator.invalid_reason(candle, received, log.anchor, closed=closed)
        if reason is not None:
            self._validator.reject(candle, reason, effects)
            return effects
        timing.record_push(time, received)
        if self._start_known and log.next is None:
            log.next = time
        if log.next is None or time >= log.next:
            self._set_silent(effects, silent=False)
            self._accept_push(candle, received, effects, closed=closed)
            self._drain(received, effects)
        elif closed:
            log.compare(candle, received, effects)
        else:
            log.flag_mismatch(candle, received)
        self._schedule_wakeup()
        return effects

    def tick(self, now: int) -> Sequence[Effect]:
        """Do what is due by ``now``; :attr:`next_wakeup` is the next time."""
        effects: list[Effect] = []
        self._drain(now, effects)
        if now >= self._backfill.hold_deadline():
            self._append_placeholders(now, effects)
        if self._backfill.allowed(now):
            if not self._start_requested:
                self._start_requested = True
                effects.append(Begin(self._timeframe.after(now, -1)))
            request = self._backfill.pending = self._with_audit(now, self._next_request(now))
            if request is not None:
                self._report_gap(request, effects)
                effects.append(request)
        self._schedule_wakeup()
        return effects

    def fetch_failed(self, now: int, retry_after: float = 0.0) -> None:
        """Record that a request failed; the venue asks to wait ``retry_after`` seconds."""
        self._backfill.failed(now, retry_after)
        self._schedule_wakeup()

    def fetch_completed(
        self, request: Fetch, candles: Sequence[Candle], now: int
    ) -> Sequence[Effect]:
        """Process the closed bars of the requested range."""
        self._backfill.succeeded()
        log = self._bar_log
        effects: list[Effect] = []
        history = self._validator.filter_valid(request, candles, now, log.anchor, effects)
        if not self._start_known:
            self._set_start(history)
        before = log.next, len(self._missing)
        log.resolve_corrections(request, history, now, effects)
        for candle in history.values():
            if log.next is not None and candle.time < log.next:
                log.compare(candle, now, effects)
            else:
                log.add_pending(Bar(candle, received=now))
        log.confirm_placeholders(request, history, now, effects)
        self._drain(now, effects)
        self._fill_gaps(request, now, effects)
        if self._next_request(now) is None or before != (log.next, len(self._missing)):
            self._backfill.reset_backoff()
        else:
            self._backfill.back_off(now)
        self._detect_silence(effects)
        self._schedule_wakeup()
        return effects

    # Confirmation of bars.

    def _set_start(self, history: dict[int, Candle]) -> None:
        """Start with the first bar of the venue's history, or the first one pushed."""
        self._start_known = True
        times = history.keys() | self._pending.keys()
        if times:
            self._bar_log.next = min(times)
        elif self._timing.newest >= 0:
            self._bar_log.next = self._timing.newest

    def _accept_push(
        self, candle: Candle, now: int, effects: list[Effect], *, closed: bool
    ) -> None:
        """Process a push of a bar that is not confirmed."""
        time = candle.time
        early = self._timeframe.after(time) - now
        if not closed:
            if early > 0 and time in self._pending:
                self._corrections.discard(time)
                rejected = self._pending.pop(time).candle
                effects.append(Reject(rejected, "reported closed, then pushed as open"))
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

    def _fill_gaps(self, request: Fetch, now: int, effects: list[Effect]) -> None:
        """Confirm flat bars in place of those that do not exist."""
        log = self._bar_log
        for time in log.missing_opens(request.end):
            if time >= request.start:
                self._missing.record_absence(time)
        while log.next is not None and log.next not in self._pending:
            time, close = log.next, self._timeframe.after(log.next)
            alive = bool(self._pending) or self._timing.newest > time or self._quiet_allowed
            if not alive or not self._missing.confirmed(time) or close + self._lag > now:
                return
            log.append_flat(time, close, now, effects)
            if self._fills_empty:  # the venue should have had the bar
                self._backfill.schedule_audit(now + _RECHECK_MS)
            self._drain(now, effects)

    @property
    def _quiet_allowed(self) -> bool:
        return not self._fills_empty and self._bar_log.trailing_flat_bars < _MAX_QUIET_BARS

    def _append_placeholders(self, now: int, effects: list[Effect]) -> None:
        """Confirm placeholders in place of missing bars."""
        log = self._bar_log
        for _ in range(_MAX_PLACEHOLDERS):
            time = log.next
            if time is None or not log.has_gap or (close := self._timeframe.after(time)) > now:
                return
            log.append_flat(time, close, 0, effects)
            self._drain(now, effects)

    # Requests and their times.

    def _next_request(self, now: int) -> Fetch | None:
        """Range of all bars to request by now."""
        time = self._bar_log.next
        if time is None:
            first = max(0, self._timeframe.after(now, -self._history_bars))
            return None if self._start_known else Fetch(first, now)
        missing = list(self._bar_log.missing_opens(self._timing.closed_by(now)))
        times = [*self._corrections.ready(now, time), *missing[:1], *missing[-1:]]
        times = times or self._missing.oldest(_MAX_PLACEHOLDERS)
        return Fetch(min(times), self._timeframe.after(max(times))) if times else None

    def _with_audit(self, now: int, request: Fetch | None) -> Fetch | None:
        """Extend the request by the newest confirmed bars if an audit is due."""
        time, first = self._bar_log.next, self._bar_log.newest(_AUDIT_BARS)
        delay = _AUDIT_DELAY_MS if request is not None else 0
        if time is None or first is None or not self._backfill.audit_due(now - delay):
            return request
        return Fetch(first, time if request is None else max(request.end, time))

    def _report_gap(self, request: Fetch, effects: list[Effect]) -> None:
        time = self._bar_log.next
        if time is None or time == self._last_gap or not request.start <= time < request.end:
            return
        if self._pending or self._timing.newest > time:
            self._last_gap = time
            effects.append(Gap(time, request.end))

    def _detect_silence(self, effects: list[Effect]) -> None:
        """Report silence if neither pushes nor the history have the bar that is due."""
        time, timing = self._bar_log.next, self._timing
        if time is None or self._pending or timing.newest > time or self._quiet_allowed:
            return
        if timing.last_push < self._timeframe.after(time) and self._missing.confirmed(time):
            self._set_silent(effects, silent=True)

    def _set_silent(self, effects: list[Effect], *, silent: bool) -> None:
        if silent != self.silent:
            self.silent = silent
            effects.append(Silence(silent))

    def _schedule_wakeup(self) -> None:
        """Set :attr:`next_wakeup` to the first moment at which something is due."""
        time, backfill = self._bar_log.next, self._backfill
        self.live = time is not None and not self.silent and not self._bar_log.has_gap
        if time is None:
            self.next_wakeup = NEVER if self._start_known else backfill.earliest(0)
            return
        close = self._timeframe.after(time)
        due = 0 if self._missing else min(backfill.next_audit, self._corrections.next_due(time))
        if time not in self._pending:
            due = min(due, self._timing.deadline(time, close))
        wake = backfill.earliest(due)
        if time in self._pending:
            wake = min(wake, close)
        elif self._pending:
            wake = min(wake, max(close, backfill.hold_deadline()))
        self.next_wakeup = wake
