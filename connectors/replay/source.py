"""Recorded candles and frames as a live venue."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from heapq import merge
from itertools import groupby
from operator import attrgetter
from typing import Self

from kronos_connectors.replay.candles import CandleFile
from kronos_connectors.replay.captures import CaptureFile, is_capture
from kronos_connectors.replay.recordings import FileSpec, InvalidFrame, RecordedFile
from kronos_connectors.replay.replay_clock import AdvanceTo
from kronos_stream.interfaces.source import SourceCallbacks, SourceError, Traits
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.candle_files import CandleFileError
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_CANDLE_TRAITS = Traits(grace_seconds=0.0, history_lag_seconds=0.0)
_CAPTURE_TRAITS = Traits(fills_empty=True)
"""Of Binance."""

_NEVER_RETRY_SECONDS = 1e9

_received = attrgetter("received")


class Recording:
    """Files of one venue. All times are UTC ms."""

    def __init__(self, candles: Sequence[CandleFile], captures: Sequence[CaptureFile]) -> None:
        """Of a series in both, the candles count up to where the capture begins.

        Raises CandleFileError where the files do not fit together.
        """
        self.files: list[RecordedFile] = [*captures]
        captured = {series: track.begin for track in captures for series in track.series}
        for track in candles:
            known = next((one for one in candles if one.only_series == track.only_series), track)
            if known is not track:
                raise CandleFileError(
                    f"{track.path}: its series is {track.only_series}, as is that of {known.path}; join "
                    f"the files, or name it otherwise: SERIES={track.path}"
                )
            begin = captured.get(track.only_series)
            cut = track if begin is None else track.until(begin)
            if cut is not None:
                self.files.append(cut)
        self.series = frozenset(series for track in self.files for series in track.series)
        venues = sorted({series.venue for series in self.series})
        if len(venues) != 1:
            raise CandleFileError(
                f"{self.files[0].path}: one replay is of one venue, and these are of "
                f"{', '.join(venues)}; name files: SERIES=FILE"
            )
        (self.venue,) = venues
        self.traits = _CAPTURE_TRAITS if captures else _CANDLE_TRAITS

    @classmethod
    def read(cls, files: Sequence[str]) -> Self:
        """Each of ``files`` is FILE or SERIES=FILE. Raises CandleFileError."""
        wanted = [FileSpec.parse(text) for text in files]
        captures = [one for one in wanted if is_capture(one.path)]
        return cls(
            [CandleFile.read(one) for one in wanted if one not in captures],
            [CaptureFile.read(one) for one in captures],
        )

    def end(self, series: Series) -> int:
        """After this nothing is told of ``series``."""
        return max(track.end for track in self.files if series in track.series)

    def start(self, lookback: int) -> int:
        """The moment after which the first close is one with ``lookback`` bars, if there is any."""
        return min(track.start(lookback) for track in self.files)

    def count(self, start: int) -> int:
        """How many bars close after ``start``."""
        return sum(track.count(start) for track in self.files)

    def events(self, start: int) -> Iterator[Update | InvalidFrame]:
        """What became known after ``start``, in the order of time."""
        return merge(*(track.events(start) for track in self.files), key=_received)

    def history(self, series: Series, start: int, end: int, now: int) -> Sequence[Candle]:
        """The bars with start <= open < end that are known to be closed at ``now``, ascending."""
        bars = {
            candle.time: candle
            for track in reversed(self.files)  # of two words on a bar the captured one counts
            if series in track.series
            for candle in track.history(series, start, end, now)
        }
        return [bars[time] for time in sorted(bars)]


class ReplaySource:
    """A venue that lives a recording. What the recording lacks, the venue does not have."""

    def __init__(
        self,
        recording: Recording,
        clock: Clock,
        start: int,
        *,
        advance_to: AdvanceTo | None = None,
        max_closes: int | None = None,
    ) -> None:
        """What is known by ``start``, UTC ms, is history; what comes to be known later is pushed.

        reach: how time comes to pass; left out, by waiting for the clock. closes: end after so
        many moments at which bars closed.
        """
        self.venue = recording.venue
        self.traits = recording.traits
        self._recording, self._clock, self._start = recording, clock, start
        self._advance_to = advance_to or clock.sleep_until
        self._max_closes = max_closes
        self._followed: frozenset[Series] = frozenset()

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:
        recorded = self._recording.series
        has = ", ".join(sorted(one.name for one in recorded))
        return {one: f"not recorded; there are {has}" for one in series if one not in recorded}

    def subscribe(self, series: Collection[Series]) -> None:
        self._followed = frozenset(series)

    async def run(self, callbacks: SourceCallbacks) -> None:
        left = self._max_closes
        for moment, told in groupby(self._recording.events(self._start), _received):
            if left == 0:
                return
            await self._advance_to(moment)
            closed = [self._push(callbacks, one) for one in told]
            if left is not None:
                left -= any(closed)

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        if start >= self._recording.end(series):
            # What comes after is not known; to say that nothing does would make flat bars of it.
            raise SourceError("its recording has ended", _NEVER_RETRY_SECONDS)
        return self._recording.history(series, start, end, self._clock.now())

    async def close(self) -> None:
        """There is nothing to let go of."""

    def _push(self, callbacks: SourceCallbacks, told: Update | InvalidFrame) -> bool:
        """Whether it was the last word on a bar that is followed."""
        if isinstance(told, InvalidFrame):
            callbacks.reject(told.series, told.reason, told.raw)
            return False
        if told.series not in self._followed:
            return False
        callbacks.update(told)
        return told.closed
