"""The tape of one series: its closed bars, each once and in order, whatever the venue's pushes do.

A tape takes in what is pushed, what the venue's history answers, and the passing of time, and
says what follows (:mod:`kronos_stream.market.effects`). It reads no clock and does no I/O. At any
moment it knows which bars must have closed and which of them it lacks; those it asks for, the
history decides, and the rest is waiting:

* A bar counts as closed when the venue says so, never before its close by our clock. Without that
  word it is asked for once a later bar shows up, or its grace is over.
* Bars behind a hole are held. What REST, alive and asked twice, does not have some seconds after
  its close, while the venue goes on, does not exist: a flat bar without volume takes its place.
  A venue that sends nothing where nothing trades need not go on for that.
* A closed bar that is pushed again with other values is asked for again: pushes come twice, late
  and out of order, so REST has the last word on which content is the newer.
* While REST cannot be had, nothing can be known. Once patience ends, bars held behind a hole go on
  all the same; those in it are owed: made up for now, and asked for until REST answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from kronos_stream.market.candle import Bar, Candle
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
from kronos_stream.market.grid import Grid
from kronos_stream.market.timeframe import Timeframe

NEVER = 1 << 62
"""A moment that does not come."""

_SKEW_MS = 2_000
"""How far the venue's clock may be ahead of ours. Within that a bar said to be closed waits for
its close by our clock; what is further ahead is not the clocks' fault."""

_EARLY_MS = 500
"""A bar said to be closed earlier than that is compared with what REST says of it."""

_SETTLE_MS = 200
"""Pushes cross on their way: the word missing now may arrive within that."""

_LAG_MS = 5_000
"""How long after a bar's close, or its change, REST may not know of it yet."""

_ANSWERS = 2
"""How often REST must say so before a bar does not exist or did not change."""

_PAUSE_MS, _LONGEST_PAUSE_MS = 1_000, 60_000
_PATIENCE_BARS, _PATIENCE_MS = 10, 600_000
"""How long bars are held for a REST that cannot be had: the shorter of the two."""

_QUIET_BARS = 60
"""After so many flat bars in a row without a sign of life a quiet symbol is a silent one."""

_MEMORY = 96
"""Bars whose exact content is kept, to know a change when it is pushed."""

_HELD = 256
"""Pushed bars held at most; what comes beyond is missing, and asked for."""

_AUDIT_BARS, _SHORTEST_AUDIT_MS, _LONGEST_AUDIT_MS, _AUDITED = 30, 60_000, 600_000, 90
"""After how many bars the newest are asked for again, and how many: a change of theirs may not
have been pushed."""

_ASKED = 1_000
"""Bars asked for at a time."""


@dataclass(slots=True)
class _Claim:
    """What speaks against a bar on the tape."""

    candle: Candle
    since: int
    answers: int = 0


def _same(a: Candle, b: Candle) -> bool:
    """Equal as far as both say."""
    return a[:6] == b[:6] and (a.amount == b.amount or a.amount is None or b.amount is None)


class Tape:
    """The ledger of one series. All times are UTC ms; ``now`` and ``received`` never go back far.

    wake: when :meth:`tick` has something to do.
    silent: True while neither pushes nor REST have the bar that is due.
    """

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
        self.silent = False
        self._grid = Grid(timeframe)
        self._random = random
        self._grace = round(grace_seconds * 1000)
        self._lag = _LAG_MS if patience_seconds is None else round(patience_seconds * 1000)
        self._answers, self._settle = (_ANSWERS, _SETTLE_MS) if self._lag else (1, 0)
        self._patience = min(_PATIENCE_BARS * (self._grid.step or _PATIENCE_MS), _PATIENCE_MS)
        self._fills_empty = fills_empty
        self._history = history
        self._recent = {bar.candle.time: bar for bar in known[-_MEMORY:]} if whole else {}
        self._held = {} if whole else {bar.candle.time: bar for bar in known}
        """Closed bars that stand behind a hole, or whose close is just ahead by our clock."""
        self._owed = {
            bar.candle.time: bar for bar in known if whole and bar.synthetic and not bar.received
        }
        self._claims: dict[int, _Claim] = {}
        self._absent: dict[int, int] = {}
        """How often REST answered without a bar."""
        self._founded = bool(whole and known)
        """Whether the tape has its first bar, or none there is."""
        self._begun = self._founded
        if self._founded:
            self.next = self._grid.after(known[-1].candle.time)
        self._seen, self._seen_at = -1, 0
        """Newest bar that anything was pushed of, and since when."""
        self._heard = 0
        self._quiet = 0
        self._asking: Fetch | None = None
        self._tries = self._pause_until = 0
        self._failing_since: int | None = None
        self._gap = self._refused = -1
        every = _AUDIT_BARS * (self._grid.step or _LONGEST_AUDIT_MS)
        self._audit_ms = min(max(every, _SHORTEST_AUDIT_MS), _LONGEST_AUDIT_MS)
        self._audit = NEVER

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
        fault = self._fault(candle, received, self._anchor(), closed=closed)
        if fault is not None:
            if time != self._refused:  # an open bar is pushed many times
                self._refused = time
                effects.append(Reject(candle, fault))
            return effects
        if time > self._seen:
            self._seen, self._seen_at = time, received
        if self._founded and self.next is None:
            self.next = time
        if self.next is None or time >= self.next:
            self._heard = received
            self._set_silent(effects, silent=False)
            if closed and (time == self.next or len(self._held) < _HELD):
                self._hold(Bar(candle, received=received), received)
                if self._grid.after(time) > received + _EARLY_MS:
                    # One answer will do: there is nothing that REST might not know yet.
                    self._claims[time] = _Claim(candle, received - self._lag, self._answers - 1)
            elif time in self._held and self._grid.after(time) > received:
                lie = self._held.pop(time).candle
                self._claims.pop(time, None)
                effects.append(Reject(lie, "said to be closed, and then pushed as open"))
            self._drain(received, effects)
        elif closed:
            self._contradict(candle, received, effects)
        self._plan()
        return effects

    def tick(self, now: int) -> Sequence[Effect]:
        """Do what time has made due; :attr:`wake` says when again."""
        effects: list[Effect] = []
        self._drain(now, effects)
        self._make_up(now, effects)
        if self._asking is None and now >= self._pause_until:
            self._asking = self._wanted(now) or self._audited(now)
            if not self._begun:
                self._begun = True
                effects.append(Begin(self._grid.before(now)))
            if self._asking is not None:
                self._note_gap(self._asking, effects)
                effects.append(self._asking)
        self._plan()
        return effects

    def failed(self, now: int, retry_after: float = 0.0) -> None:
        """What was asked for last was not answered; not to be asked within ``retry_after`` s."""
        self._asking = None
        if self._failing_since is None:
            self._failing_since = now
        self._pause(now, round(retry_after * 1000))
        self._plan()

    def answered(self, asked: Fetch, candles: Sequence[Candle], now: int) -> Sequence[Effect]:
        """The venue's closed bars of the range asked for."""
        start, end = asked
        self._asking = self._failing_since = None
        effects: list[Effect] = []
        given = self._believed(candles, start, end, now, effects)
        if not self._founded:
            self._found(given)
        before = self.next, len(self._owed)
        self._judge(given, start, end, now, effects)
        for candle in given.values():
            if self.next is not None and candle.time < self.next:
                self._contradict(candle, now, effects)
            else:
                self._hold(Bar(candle, received=now), now)
        self._fill(start, end, now, effects)
        if self._wanted(now) is None or before != (self.next, len(self._owed)):
            self._tries = self._pause_until = 0
        else:
            self._pause(now)
        self._listen(effects)
        self._plan()
        return effects

    # What is believed.

    def _anchor(self) -> int | None:
        return next(iter(self._held), None) if self.next is None else self.next

    def _fault(self, candle: Candle, now: int, anchor: int | None, *, closed: bool) -> str | None:
        """Why ``candle`` cannot be; an open bar's values are not looked at."""
        time = candle.time
        if time > now + _SKEW_MS:
            return f"opens {(time - now) / 1000:g} s from now"
        if not self._grid.has(time, anchor):
            return f"no bar of {self._grid.timeframe} opens at {time}"
        if not closed:
            return None
        early = self._grid.after(time) - now
        if early > _SKEW_MS:
            return f"said to be closed {early / 1000:g} s before its close"
        return candle.fault()

    def _believed(
        self, candles: Sequence[Candle], start: int, end: int, now: int, effects: list[Effect]
    ) -> dict[int, Candle]:
        """What of an answer can be, by open."""
        given: dict[int, Candle] = {}
        anchor = self._anchor()
        for candle in candles:
            fault = self._fault(candle, now, anchor, closed=True)
            if fault is None and not start <= candle.time < end:
                fault = "not what was asked for"
            if fault is None:
                given[candle.time] = candle
                anchor = candle.time if anchor is None else anchor
            else:
                effects.append(Reject(candle, fault))
        return given

    def _found(self, given: dict[int, Candle]) -> None:
        """Begin where the venue's history, or what is known of it, begins."""
        self._founded = True
        times = given.keys() | self._held.keys()
        if times:
            self.next = min(times)
        elif self._seen >= 0:
            self.next = self._seen

    def _hold(self, bar: Bar, now: int) -> None:
        time = bar.candle.time
        old = self._held.get(time)
        if old is None:
            self._held[time] = bar
        elif old.synthetic:
            self._held[time] = bar._replace(revision=old.revision + 1)
        elif self._grid.after(time) > now:
            self._held[time] = bar
            self._claims.pop(time, None)
        elif not _same(old.candle, bar.candle):
            self._claims[time] = _Claim(bar.candle, now)

    def _contradict(self, candle: Candle, now: int, effects: list[Effect]) -> None:
        """Take in a word on a bar that stands on the tape already, if it is a new one."""
        time = candle.time
        bar = self._recent.get(time) or self._owed.get(time)
        if bar is None:
            return  # older than the memory, where nothing can be told from a stale push
        if bar.synthetic:
            self._revise(candle, now, effects)
        elif not _same(bar.candle, candle):
            claim = self._claims.get(time)
            if claim is None or not _same(claim.candle, candle):
                self._claims[time] = _Claim(candle, now)

    def _judge(
        self, given: dict[int, Candle], start: int, end: int, now: int, effects: list[Effect]
    ) -> None:
        """Hold an answer against the bars that are in doubt, and those that are owed."""
        for time, claim in list(self._claims.items()):
            bar = self._recent.get(time)
            if bar is None and time not in self._held:
                del self._claims[time]  # too old by now
            if bar is None or not start <= time < end:
                continue
            claim.answers += 1
            decided = claim.answers >= self._answers and now >= claim.since + self._lag
            said = given.get(time, claim.candle if decided else bar.candle)
            if not _same(said, bar.candle) and (decided or _same(said, claim.candle)):
                self._revise(said, now, effects)
            elif decided:
                del self._claims[time]
            elif not _same(said, bar.candle):
                claim.candle = said
        for time, bar in list(self._owed.items()):
            if start <= time < end and time not in given and self._gone(time) >= self._answers:
                del self._owed[time], self._absent[time]
                confirmed = bar._replace(received=now)
                if time in self._recent:
                    self._recent[time] = confirmed
                effects.append(Confirm(confirmed))

    def _gone(self, time: int) -> int:
        count = self._absent[time] = self._absent.get(time, 0) + 1
        return count

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
        self._absent.pop(time, None)
        if self._failing_since is None:
            self._tries = self._pause_until = 0
        if bar.synthetic:
            self._quiet += 1
        else:
            self._quiet = 0
            self._set_silent(effects, silent=False)
        effects.append(Append(bar))

    def _revise(self, candle: Candle, now: int, effects: list[Effect]) -> None:
        time = candle.time
        old = self._recent.get(time) or self._owed[time]
        bar = Bar(candle, old.revision + 1, received=now)
        if time in self._recent:
            self._recent[time] = bar
        self._owed.pop(time, None)
        self._claims.pop(time, None)
        self._absent.pop(time, None)
        newest = self._grid.after(time) == self.next
        if newest:
            self._quiet = 0
        effects.append(Revise(bar, newest))

    def _fill(self, start: int, end: int, now: int, effects: list[Effect]) -> None:
        """Append what has come; make flat bars of what the venue does not have."""
        self._drain(now, effects)
        for time in self._lacking(end):
            if time >= start:
                self._gone(time)
        while self.next is not None and self.next not in self._held:
            close = self._grid.after(self.next)
            lacking = self._absent.get(self.next, 0) >= self._answers and close + self._lag <= now
            goes_on = bool(self._held) or self._seen > self.next
            if not lacking or not (goes_on or self._may_be_quiet):
                return
            self._append_flat(self.next, close, now, effects)
            self._drain(now, effects)

    @property
    def _may_be_quiet(self) -> bool:
        return not self._fills_empty and self._quiet < _QUIET_BARS

    def _make_up(self, now: int, effects: list[Effect]) -> None:
        """Go on without the missing bars where REST has not been there for too long."""
        if self._failing_since is None or now - self._failing_since < self._patience:
            return
        for _ in range(_ASKED):
            if self.next is None or not self.holed or (close := self._grid.after(self.next)) > now:
                return
            time = self.next
            self._append_flat(time, close, 0, effects)
            if time in self._recent:
                self._owed[time] = self._recent[time]
            if len(self._owed) > self._history:
                del self._owed[next(iter(self._owed))]
            self._drain(now, effects)

    def _append_flat(self, time: int, close: int, received: int, effects: list[Effect]) -> None:
        if not self._recent:  # what no bar stands before is not missed
            self._absent.pop(time, None)
            self.next = close
            return
        last = next(reversed(self._recent.values())).candle
        price = last.close
        amount = None if last.amount is None else 0.0
        candle = Candle(time, price, price, price, price, 0.0, amount)
        self._append(Bar(candle, synthetic=True, received=received), close, effects)

    # What is asked for, and when.

    def _lacking(self, end: int) -> Iterator[int]:
        """The next bars, as far as they close by ``end`` and are not held."""
        time = self.next
        for _ in range(_ASKED):
            if time is None or (close := self._grid.after(time)) > end:
                return
            if time not in self._held:
                yield time
            time = close

    def _missing(self, now: int) -> list[int]:
        """Bars that must have closed, and of which the last word has not come."""
        later = self._seen if self._seen_at + self._settle <= now else 0
        return list(self._lacking(max(now - self._grace, later)))

    def _wanted(self, now: int) -> Fetch | None:
        if self.next is None:
            return (
                None if self._founded else Fetch(max(0, self._grid.before(now, self._history)), now)
            )
        times = [
            time
            for time, claim in self._claims.items()
            if time < self.next and claim.since + self._settle <= now
        ]
        if missing := self._missing(now):
            times += missing[0], missing[-1]
        if not times:
            times = list(self._owed)[:_ASKED]
        return Fetch(min(times), self._grid.after(max(times))) if times else None

    def _audited(self, now: int) -> Fetch | None:
        """The newest bars, from time to time; what differs is in doubt then."""
        if self.next is None or not self._recent or now < self._audit < NEVER:
            return None
        due, self._audit = (
            self._audit <= now,
            now + round(self._audit_ms * self._random.uniform(1, 1.5)),
        )
        return Fetch(list(self._recent)[-_AUDITED:][0], self.next) if due else None

    def _note_gap(self, asked: Fetch, effects: list[Effect]) -> None:
        time = self.next
        later = bool(self._held) or (time is not None and self._seen > time)
        if time is not None and time != self._gap and later and asked.start <= time < asked.end:
            self._gap = time
            effects.append(Gap(time, asked.end))

    def _pause(self, now: int, least: int = 0) -> None:
        """Ask again later and later, no two series at the same time."""
        pause = min(_PAUSE_MS << min(self._tries, 16), _LONGEST_PAUSE_MS)
        self._tries += 1
        self._pause_until = now + least + round(pause * self._random.uniform(1, 1.25))

    def _listen(self, effects: list[Effect]) -> None:
        """Notice that neither pushes nor REST say anything of the bar that is due."""
        if self.next is None or self._held or self._seen > self.next or self._may_be_quiet:
            return
        close = self._grid.after(self.next)
        if self._absent.get(self.next, 0) >= self._answers and self._heard < close:
            self._set_silent(effects, silent=True)

    def _set_silent(self, effects: list[Effect], *, silent: bool) -> None:
        if silent != self.silent:
            self.silent = silent
            effects.append(Silence(silent))

    def _plan(self) -> None:
        """Set :attr:`wake` to the first moment at which anything is to be done."""
        wake = NEVER
        time = self.next
        close = None if time is None else self._grid.after(time)
        if self._asking is None:
            wake = max(self._due(time, close), self._pause_until)
        if close is not None and time in self._held:
            wake = min(wake, close)
        elif self._failing_since is not None and self._held:
            wake = min(wake, max(close or 0, self._failing_since + self._patience))
        self.wake = wake

    def _due(self, time: int | None, close: int | None) -> int:
        """When something is to be asked for."""
        if time is None or close is None:
            return NEVER if self._founded else 0
        if self._owed:
            return 0
        due = self._audit
        if time not in self._held:
            due = close + self._grace
            if self._seen > time:
                due = min(due, self._seen_at + self._settle)
        for doubtful, claim in self._claims.items():
            if doubtful < time:
                due = min(due, claim.since + self._settle)
        return due
