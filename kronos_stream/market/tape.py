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

from collections.abc import Iterator, Sequence
from random import Random

from kronos_stream.market.asking import NEVER, Asking
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.claims import Claims, same
from kronos_stream.market.debts import Debts, flat
from kronos_stream.market.effects import (
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
from kronos_stream.market.gate import Gate
from kronos_stream.market.grid import Grid
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

_MEMORY, _AUDITED = 96, 90
"""Bars whose exact content is kept, to know a change; how many of them an audit asks for."""

_ODD_MS = 60_000
"""After that a bar is asked for again that a venue should have had."""

_LATEST_MS = 30_000
"""A last word so much later than the close is no measure of when the next is to be expected."""

_HELD = 256
"""Pushed bars held at most; what comes beyond is missing, and asked for."""

_ASKED = 1_000
"""Bars asked for at a time."""

_MONTH_MS = 30 * 86_400_000


class Tape:
    """The ledger of one series. All times are UTC ms."""

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
        self.next: int | None = None
        """Open of the bar that the tape waits for; None until a first one is known."""
        self.wake = 0
        """When :meth:`tick` has something to do."""
        self.silent = False
        """Whether neither pushes nor the history have the bar that is due."""
        self._grid = Grid(timeframe)
        self._gate = Gate(self._grid)
        self._grace = round(grace_seconds * 1000)
        self._lag = _LAG_MS if patience_seconds is None else round(patience_seconds * 1000)
        answers, self._settle = (_ANSWERS, _SETTLE_MS) if self._lag else (1, 0)
        self._fills_empty, self._history = fills_empty, history
        self._asking = Asking(self._grid.step or _MONTH_MS, random)
        self._claims = Claims(self._settle, self._lag, answers)
        self._recent: dict[int, Bar] = {}
        """The newest bars on the tape."""
        self._held: dict[int, Bar] = {}
        """Closed bars that stand behind a hole, or whose close is just ahead by our clock."""
        self._seen, self._seen_at = -1, 0
        """Newest bar of which anything was pushed, and when that was first."""
        self._heard = self._quiet = 0
        """When anything was pushed last; flat bars at the end of the tape."""
        self._late = 0.0
        """How long after its close, by our clock, a bar's last word comes: the venue's clock may
        be behind ours. Averaged over some bars, in ms."""
        self._gap = -1
        self._founded = self._begun = whole and bool(known)
        """Whether the first bar is known, or that there is none yet; whether that was asked."""
        self._debts = Debts(answers, history, known if self._founded else ())
        bars = {bar.candle.time: bar for bar in known}
        if self._founded:
            self.next = self._grid.after(known[-1].candle.time)
            self._recent = dict(list(bars.items())[-_MEMORY:])
        else:
            self._held = bars

    @property
    def holed(self) -> bool:
        """Whether bars are held because those before them are missing."""
        return bool(self._held) and self.next not in self._held

    @property
    def live(self) -> bool:
        """Whether the next bar can be expected in time."""
        return self.next is not None and not self.silent and not self.holed

    def update(self, candle: Candle, closed: bool, received: int) -> Sequence[Effect]:  # noqa: FBT001
        """Take in a push: a bar so far, or the venue's last word on it."""
        time = candle.time
        if time == self._seen and not closed and not self._held and not self.silent:
            # Nearly all pushes end here. Their values mean nothing yet, so nobody judges them.
            self._heard = received
            return ()
        effects: list[Effect] = []
        fault = self._gate.fault(candle, received, self._anchor(), closed=closed)
        if fault is not None:
            self._gate.reject(candle, fault, effects)
            return effects
        if time > self._seen:
            self._seen, self._seen_at = time, received
        if self._founded and self.next is None:
            self.next = time
        if self.next is None or time >= self.next:
            self._heard = received
            self._set_silent(effects, silent=False)
            self._take(candle, received, effects, closed=closed)
            self._drain(received, effects)
        elif closed:
            self._compare(candle, received, effects)
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
        effects: list[Effect] = []
        given = self._gate.believed(asked, candles, now, self._anchor(), effects)
        if not self._founded:
            self._found(given)
        before = self.next, len(self._debts)
        for changed in self._claims.judge(*asked, given, now, self._recent):
            self._revise(changed, now, effects)
        for candle in given.values():
            if self.next is not None and candle.time < self.next:
                self._compare(candle, now, effects)
            else:
                self._hold(Bar(candle, received=now))
        for bar in self._debts.settle(asked, given, now):
            if bar.candle.time in self._recent:
                self._recent[bar.candle.time] = bar
            effects.append(Confirm(bar))
        self._drain(now, effects)
        self._fill(asked, now, effects)
        if self._wanted(now) is None or before != (self.next, len(self._debts)):
            self._asking.ease()
        else:
            self._asking.pause(now)
        self._listen(effects)
        self._plan()
        return effects

    # What is believed.

    def _anchor(self) -> int | None:
        return next(iter(self._held), None) if self.next is None else self.next

    def _found(self, given: dict[int, Candle]) -> None:
        """Begin where the venue's history, or what is known of it, begins."""
        self._founded = True
        times = given.keys() | self._held.keys()
        if times:
            self.next = min(times)
        elif self._seen >= 0:
            self.next = self._seen

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
        elif time == self.next or len(self._held) < _HELD:
            if time == self.next and -early < _LATEST_MS:
                self._late += (-early - self._late) / 8
            self._hold(Bar(candle, received=now))

    def _hold(self, bar: Bar) -> None:
        time = bar.candle.time
        old = self._held.get(time)
        if old is None:
            self._held[time] = bar
        elif old.synthetic:
            self._held[time] = bar._replace(revision=old.revision + 1)
        elif not same(old.candle, bar.candle):
            self._claims.put(bar.candle, bar.received)

    def _compare(self, candle: Candle, now: int, effects: list[Effect]) -> None:
        """Take in a word on a bar that stands on the tape already, if it is a new one."""
        bar = self._on_tape(candle.time)
        if bar is None:
            return  # older than the memory, where a change cannot be told from a stale push
        if bar.synthetic:
            self._revise(candle, now, effects)
        elif not same(bar.candle, candle):
            self._claims.put(candle, now)

    # What is put on the tape.

    def _drain(self, now: int, effects: list[Effect]) -> None:
        while self.next is not None and self.next in self._held:
            close = self._grid.after(self.next)
            if close > now:
                return
            self._append(self._held.pop(self.next), close, effects)

    def _append(self, bar: Bar, close: int, effects: list[Effect]) -> None:
        time = bar.candle.time
        self._recent[time] = bar
        if len(self._recent) > _MEMORY:
            del self._recent[next(iter(self._recent))]
        self.next = close
        self._debts.pay(time)
        self._asking.ease()
        if bar.synthetic:
            self._quiet += 1
        else:
            self._quiet = 0
            self._set_silent(effects, silent=False)
        effects.append(Append(bar))

    def _revise(self, candle: Candle, now: int, effects: list[Effect]) -> None:
        time = candle.time
        old = self._on_tape(time)
        bar = Bar(candle, 1 if old is None else old.revision + 1, received=now)
        if time in self._recent:
            self._recent[time] = bar
        self._debts.pay(time)
        self._claims.drop(time)
        newest = self._grid.after(time) == self.next
        if newest:
            self._quiet = 0
        effects.append(Revise(bar, newest))

    def _fill(self, asked: Fetch, now: int, effects: list[Effect]) -> None:
        """Put flat bars in the place of those that do not exist."""
        for time in self._lacking(asked.end):
            if time >= asked.start:
                self._debts.absent(time)
        while self.next is not None and self.next not in self._held:
            time, close = self.next, self._grid.after(self.next)
            goes_on = bool(self._held) or self._seen > time or self._may_be_quiet
            if not goes_on or not self._debts.gone(time) or close + self._lag > now:
                return
            last = self._last()
            if last is None:
                self._skip(time, close)
            else:
                self._append(flat(time, last, now), close, effects)
                if self._fills_empty:  # odd: it should have had the bar
                    self._asking.audit_by(now + _ODD_MS)
            self._drain(now, effects)

    @property
    def _may_be_quiet(self) -> bool:
        return not self._fills_empty and self._quiet < _QUIET_BARS

    def _make_up(self, now: int, effects: list[Effect]) -> None:
        """Go on without the missing bars."""
        for _ in range(_ASKED):
            if self.next is None or not self.holed or (close := self._grid.after(self.next)) > now:
                return
            time, last = self.next, self._last()
            if last is None:
                self._skip(time, close)
            else:
                made_up = flat(time, last)
                self._append(made_up, close, effects)
                self._debts.owe(made_up)
            self._drain(now, effects)

    def _skip(self, time: int, close: int) -> None:
        """What no bar stands before is not missed."""
        self._debts.pay(time)
        self.next = close

    def _last(self) -> Candle | None:
        return self._recent[next(reversed(self._recent))].candle if self._recent else None

    def _on_tape(self, time: int) -> Bar | None:
        """The bar, unless it is older than the memory."""
        return self._recent.get(time) or self._debts.get(time)

    # What is asked for, and when.

    @property
    def _grace_now(self) -> int:
        return self._grace + int(self._late)

    def _lacking(self, end: int) -> Iterator[int]:
        """The next bars, as far as they close by ``end`` and are not held."""
        time = self.next
        for _ in range(_ASKED):
            if time is None or (close := self._grid.after(time)) > end:
                return
            if time not in self._held:
                yield time
            time = close

    def _wanted(self, now: int) -> Fetch | None:
        """What is to be asked for by now, as one range."""
        if self.next is None:
            first = max(0, self._grid.before(now, self._history))
            return None if self._founded else Fetch(first, now)
        later = self._seen if self._seen_at + self._settle <= now else 0
        missing = list(self._lacking(max(now - self._grace_now, later)))
        times = [*self._claims.ripe(now, self.next), *missing[:1], *missing[-1:]]
        times = times or self._debts.oldest(_ASKED)
        return Fetch(min(times), self._grid.after(max(times))) if times else None

    def _audited(self, now: int, wanted: Fetch | None) -> Fetch | None:
        """What is wanted; from time to time the newest bars on the tape with it."""
        if self.next is None or not self._recent or not self._asking.audit_due(now):
            return wanted
        first = list(self._recent)[-_AUDITED:][0]
        return Fetch(first, self.next if wanted is None else max(wanted.end, self.next))

    def _note_gap(self, asked: Fetch, effects: list[Effect]) -> None:
        time = self.next
        if time is None or time == self._gap or not asked.start <= time < asked.end:
            return
        if self._held or self._seen > time:
            self._gap = time
            effects.append(Gap(time, asked.end))

    def _listen(self, effects: list[Effect]) -> None:
        """Notice that neither pushes nor the history have anything of the bar that is due."""
        if self.next is None or self._held or self._seen > self.next or self._may_be_quiet:
            return
        unheard = self._heard < self._grid.after(self.next)
        if unheard and self._debts.gone(self.next):
            self._set_silent(effects, silent=True)

    def _set_silent(self, effects: list[Effect], *, silent: bool) -> None:
        if silent != self.silent:
            self.silent = silent
            effects.append(Silence(silent))

    def _plan(self) -> None:
        """Set :attr:`wake` to the first moment at which anything is to be done."""
        time, asking = self.next, self._asking
        if time is None:
            self.wake = NEVER if self._founded else asking.earliest(0)
            return
        close = self._grid.after(time)
        due = asking.audit
        claimed = self._claims.due(time)
        if claimed is not None:
            due = min(due, claimed)
        if self._debts:
            due = 0
        if time not in self._held:
            due = min(due, close + self._grace_now)
            if self._seen > time:
                due = min(due, self._seen_at + self._settle)
        wake = asking.earliest(due)
        if time in self._held:
            wake = min(wake, close)
        elif self._held:
            wake = min(wake, max(close, asking.patience_ends()))
        self.wake = wake
