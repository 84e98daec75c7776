"""The tape of one series: its closed bars, each once and in order, whatever the venue's pushes do.

A tape takes in what is pushed, what the venue's history answers, and the passing of time, and says
what follows (:mod:`kronos_stream.market.effects`). It reads no clock and does no I/O. It knows
which bars must have closed by now and which of them it lacks; those it asks for.

* A bar counts as closed when the venue says so, never before its close by our clock. Without that
  word it is asked for once a later bar shows up, or its grace is over.
* Bars behind a hole are held. What the venue's history, asked twice, does not have some seconds
  after its close, while later bars show the venue alive, does not exist: a flat bar without volume
  takes its place. Where a venue sends nothing when nothing trades, later bars are not required.
* A bar on the tape changes only as the history says (:mod:`kronos_stream.market.claims`).
* While the history cannot be had, nothing can be known. Once patience ends, bars held behind a
  hole go on all the same; those in it are owed: made up for now, and asked for until it answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from kronos_stream.market.asking import Asking
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.claims import Claims
from kronos_stream.market.debts import Debts
from kronos_stream.market.effects import NEVER, Begin, Effect, Fetch, Gap, Reject, Silence
from kronos_stream.market.gate import Gate
from kronos_stream.market.grid import Grid
from kronos_stream.market.ledger import Ledger
from kronos_stream.market.pulse import Pulse
from kronos_stream.market.timeframe import Timeframe

_EARLY_MS = 500
"""A bar said to be closed earlier than that is compared with what the history says of it."""

_SETTLE_MS = 200
"""Pushes cross on their way: the word missing now may arrive within that."""

_LAG_MS, _ANSWERS = 5_000, 2
"""How long the history may not know of a bar or its change yet, and how often it is asked at
least, before something does not exist or did not change; Traits.patience_seconds goes first."""

_QUIET_BARS = 60
"""After so many flat bars in a row without a sign of life a quiet symbol is a silent one."""

_ODD_MS = 60_000
"""After that a bar is asked for again that a venue should have had."""

_AUDITED, _LATE_MS = 90, 15_000
"""Bars on the tape that an audit asks for, and how long it waits for other questions."""

_HELD = 256
"""Pushed bars held at most; what comes beyond is missing, and asked for."""

_OWED = 1_000
"""Bars owed that are asked for at a time; bars made up at a time."""

_MONTH_MS = 30 * 86_400_000


class Tape:
    """The ledger of one series, and what is done to keep it. All times are UTC ms."""

    def __init__(
        self,
        timeframe: Timeframe,
        random: Random,
        *,
        grace_seconds: float,
        patience_seconds: float | None,
        fills_empty: bool,
        history: int,
        known: Sequence[Bar] = (),
        whole: bool = False,
    ) -> None:
        """A tape that goes on from ``known``, contiguous bars.

        grace_seconds, patience_seconds, fills_empty: as of the venue's Traits.
        history: bars to begin with, asked for first unless ``whole`` says that ``known`` will do;
            otherwise ``known`` is appended anew in its place among them.
        """
        self.wake = 0
        """When :meth:`tick` has something to do."""
        self.silent = False
        """Whether neither pushes nor the history have the bar that is due."""
        self.live = whole and bool(known)
        """Whether the next bar can be expected in time: none is missing, and it is not silent."""
        self._grid = Grid(timeframe)
        self._gate = Gate(self._grid)
        self._lag = _LAG_MS if patience_seconds is None else round(patience_seconds * 1000)
        answers, settle = (_ANSWERS, _SETTLE_MS) if self._lag else (1, 0)
        self._claims = Claims(settle, self._lag, answers)
        self._debts = Debts(answers, history)
        self._ledger = Ledger(self._grid, self._claims, self._debts)
        self._held = self._ledger.held
        self._pulse = Pulse(round(grace_seconds * 1000), settle)
        self._asking = Asking(self._grid.step or _MONTH_MS, random)
        self._fills_empty, self._history = fills_empty, history
        self._gap = -1
        self._founded = self._begun = whole and bool(known)
        """Whether the first bar is known, or that there is none yet; whether that was asked."""
        if self._founded:
            self._ledger.restore(known)
        else:
            self._held.update((bar.candle.time, bar) for bar in known)

    @property
    def next(self) -> int | None:
        """Open of the bar that the tape waits for; None until a first one is known."""
        return self._ledger.next

    @property
    def holed(self) -> bool:
        """Whether bars are held because those before them are missing."""
        return self._ledger.holed

    @property
    def held(self) -> int:
        """Bars that wait for those before them."""
        return len(self._held) if self.holed else 0

    @property
    def owed(self) -> int:
        """Bars that are made up for now, for the history could not be had."""
        return len(self._debts)

    @property
    def last(self) -> Bar | None:
        """The newest bar on it."""
        recent = self._ledger.recent
        return recent[next(reversed(recent))] if recent else None

    def update(self, candle: Candle, closed: bool, received: int) -> Sequence[Effect]:  # noqa: FBT001
        """Take in a push: a bar so far, or the venue's last word on it."""
        time, ledger, pulse = candle.time, self._ledger, self._pulse
        if time == pulse.newest and not closed and not self._held and not self.silent:
            # Nearly all pushes end here. Their values mean nothing yet, so nobody judges them.
            pulse.heard = received
            return ()
        effects: list[Effect] = []
        fault = self._gate.fault(candle, received, ledger.anchor, closed=closed)
        if fault is not None:
            self._gate.reject(candle, fault, effects)
            return effects
        pulse.push(time, received)
        if self._founded and ledger.next is None:
            ledger.next = time
        if ledger.next is None or time >= ledger.next:
            self._set_silent(effects, silent=False)
            self._take(candle, received, effects, closed=closed)
            self._drain(received, effects)
        elif closed:
            ledger.compare(candle, received, effects)
        else:
            ledger.doubt(candle, received)
        self._plan()
        return effects

    def tick(self, now: int) -> Sequence[Effect]:
        """Do what time has made due; :attr:`wake` says when again."""
        effects: list[Effect] = []
        self._drain(now, effects)
        if now >= self._asking.patience_ends():
            self._make_up(now, effects)
        if self._asking.allowed(now):
            if not self._begun:
                self._begun = True
                effects.append(Begin(self._grid.before(now)))
            asked = self._asking.open = self._audited(now, self._wanted(now))
            if asked is not None:
                self._note_gap(asked, effects)
                effects.append(asked)
        self._plan()
        return effects

    def failed(self, now: int, retry_after: float = 0.0) -> None:
        """What was asked for was not answered; not to be asked within ``retry_after`` seconds."""
        self._asking.failed(now, retry_after)
        self._plan()

    def answered(self, asked: Fetch, candles: Sequence[Candle], now: int) -> Sequence[Effect]:
        """The venue's closed bars of the range asked for."""
        self._asking.answered()
        ledger = self._ledger
        effects: list[Effect] = []
        given = self._gate.believed(asked, candles, now, ledger.anchor, effects)
        if not self._founded:
            self._found(given)
        before = ledger.next, len(self._debts)
        ledger.judge(asked, given, now, effects)
        for candle in given.values():
            if ledger.next is not None and candle.time < ledger.next:
                ledger.compare(candle, now, effects)
            else:
                ledger.hold(Bar(candle, received=now))
        ledger.settle(asked, given, now, effects)
        self._drain(now, effects)
        self._fill(asked, now, effects)
        if self._wanted(now) is None or before != (ledger.next, len(self._debts)):
            self._asking.ease()
        else:
            self._asking.pause(now)
        self._listen(effects)
        self._plan()
        return effects

    # What is put on the tape.

    def _found(self, given: dict[int, Candle]) -> None:
        """Begin where the venue's history, or what is known of it, begins."""
        self._founded = True
        times = given.keys() | self._held.keys()
        if times:
            self._ledger.next = min(times)
        elif self._pulse.newest >= 0:
            self._ledger.next = self._pulse.newest

    def _take(self, candle: Candle, now: int, effects: list[Effect], *, closed: bool) -> None:
        """Take in a push of a bar that is not on the tape."""
        time = candle.time
        early = self._grid.after(time) - now
        if not closed:
            if early > 0 and time in self._held:
                self._claims.drop(time)
                lie = self._held.pop(time).candle
                effects.append(Reject(lie, "said to be closed, and then pushed as open"))
        elif early > 0:
            self._held[time] = Bar(candle, received=now)
            if early > _EARLY_MS:
                self._claims.check(candle, now)
        elif time == self._ledger.next or len(self._held) < _HELD:
            if time == self._ledger.next:
                self._pulse.last_word(-early)
            self._ledger.hold(Bar(candle, received=now))

    def _drain(self, now: int, effects: list[Effect]) -> None:
        before = self._ledger.next
        self._ledger.drain(now, effects)
        if self._ledger.next != before:
            self._asking.ease()
            self._set_silent(effects, silent=False)

    def _fill(self, asked: Fetch, now: int, effects: list[Effect]) -> None:
        """Put flat bars in the place of those that do not exist."""
        ledger, debts = self._ledger, self._debts
        for time in ledger.lacking(asked.end):
            if time >= asked.start:
                debts.absent(time)
        while ledger.next is not None and ledger.next not in self._held:
            time, close = ledger.next, self._grid.after(ledger.next)
            goes_on = bool(self._held) or self._pulse.newest > time or self._may_be_quiet
            if not goes_on or not debts.gone(time) or close + self._lag > now:
                return
            ledger.append_flat(time, close, now, effects)
            if self._fills_empty:  # odd: it should have had the bar
                self._asking.audit_by(now + _ODD_MS)
            self._drain(now, effects)

    @property
    def _may_be_quiet(self) -> bool:
        return not self._fills_empty and self._ledger.quiet < _QUIET_BARS

    def _make_up(self, now: int, effects: list[Effect]) -> None:
        """Go on without the missing bars."""
        ledger = self._ledger
        for _ in range(_OWED):
            time = ledger.next
            if time is None or not ledger.holed or (close := self._grid.after(time)) > now:
                return
            ledger.append_flat(time, close, 0, effects)
            self._drain(now, effects)

    # What is asked for, and when.

    def _wanted(self, now: int) -> Fetch | None:
        """What is to be asked for by now, as one range."""
        time = self._ledger.next
        if time is None:
            first = max(0, self._grid.before(now, self._history))
            return None if self._founded else Fetch(first, now)
        missing = list(self._ledger.lacking(self._pulse.closed_by(now)))
        times = [*self._claims.ripe(now, time), *missing[:1], *missing[-1:]]
        times = times or self._debts.oldest(_OWED)
        return Fetch(min(times), self._grid.after(max(times))) if times else None

    def _audited(self, now: int, wanted: Fetch | None) -> Fetch | None:
        """What is wanted; from time to time the newest bars on the tape, or these with it."""
        time, first = self._ledger.next, self._ledger.newest(_AUDITED)
        late = _LATE_MS if wanted is not None else 0
        if time is None or first is None or not self._asking.audit_due(now - late):
            return wanted
        return Fetch(first, time if wanted is None else max(wanted.end, time))

    def _note_gap(self, asked: Fetch, effects: list[Effect]) -> None:
        time = self._ledger.next
        if time is None or time == self._gap or not asked.start <= time < asked.end:
            return
        if self._held or self._pulse.newest > time:
            self._gap = time
            effects.append(Gap(time, asked.end))

    def _listen(self, effects: list[Effect]) -> None:
        """Notice that neither pushes nor the history have anything of the bar that is due."""
        time, pulse = self._ledger.next, self._pulse
        if time is None or self._held or pulse.newest > time or self._may_be_quiet:
            return
        if pulse.heard < self._grid.after(time) and self._debts.gone(time):
            self._set_silent(effects, silent=True)

    def _set_silent(self, effects: list[Effect], *, silent: bool) -> None:
        if silent != self.silent:
            self.silent = silent
            effects.append(Silence(silent))

    def _plan(self) -> None:
        """Set :attr:`wake` to the first moment at which anything is to be done."""
        time, asking = self._ledger.next, self._asking
        self.live = time is not None and not self.silent and not self._ledger.holed
        if time is None:
            self.wake = NEVER if self._founded else asking.earliest(0)
            return
        close = self._grid.after(time)
        due = 0 if self._debts else min(asking.audit, self._claims.due(time))
        if time not in self._held:
            due = min(due, self._pulse.deadline(time, close))
        wake = asking.earliest(due)
        if time in self._held:
            wake = min(wake, close)
        elif self._held:
            wake = min(wake, max(close, asking.patience_ends()))
        self.wake = wake
