"""Source that replays recorded candles and frames."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from heapq import merge
from itertools import groupby
from typing import Self

from kronos_connectors.replay.candles import CandleFile
from kronos_connectors.replay.captures import CaptureFile, is_capture
from kronos_connectors.replay.recordings import FileSpec, InvalidFrame, RecordedFile, received_at
from kronos_connectors.replay.replay_clock import AdvanceTo
from kronos_stream.interfaces.source import SourceCallbacks, SourceError, Traits
from kronos_stream.market.candle import Candle, Update
from kronos_stream.market.candle_files import CandleFileError
from kronos_stream.market.clock import Clock
from kronos_stream.market.series import Series

_CANDLE_TRAITS = Traits(grace_seconds=0.0, history_lag_seconds=0.0)
_CAPTURE_TRAITS = Traits(fills_empty=True)
"""Traits of Binance, whose frames captures hold."""

_NEVER_RETRY_SECONDS = 1e9


class Recording:
    """Files of one venue. All times are UTC ms."""

    def __init__(self, candles: Sequence[CandleFile], captures: Sequence[CaptureFile]) -> None:
        """For a series in both, candles are used up to the begin of the capture.

        Raises CandleFileError if the files do not fit together.
        """
        self.files: list[RecordedFile] = [*captures]
        captured = {series: file.begin for file in captures for series in file.series}
        for file in candles:
            first = next(other for other in candles if other.only_series == file.only_series)
            if first is not file:
                raise CandleFileError(
                    f"{file.path}: {first.path} has the same series, {file.only_series}; join the "
                    f"files, or give it another name: SERIES={file.path}"
                )
            begin = captured.get(file.only_series)
            cut = file if begin is None else file.until(begin)
            if cut is not None:
                self.files.append(cut)
        self.series = frozenset(series for file in self.files for series in file.series)
        venues = sorted({series.venue for series in self.series})
        if len(venues) != 1:
            raise CandleFileError(
                f"{self.files[0].path}: a replay has one venue, and these files have "
                f"{', '.join(venues)}; name their series: SERIES=FILE"
            )
        (self.venue,) = venues
        self.traits = _CAPTURE_TRAITS if captures else _CANDLE_TRAITS

    @classmethod
    def read(cls, files: Sequence[str]) -> Self:
        """Read ``files``, each FILE or SERIES=FILE. Raises CandleFileError."""
        wanted = [FileSpec.parse(text) for text in files]
        captures = [one for one in wanted if is_capture(one.path)]
        return cls(
            [CandleFile.read(one) for one in wanted if one not in captures],
            [CaptureFile.read(one) for one in captures],
        )

    def end(self, series: Series) -> int:
        """Time of the last event of ``series``."""
        return max(file.end for file in self.files if series in file.series)

    def start(self, lookback: int) -> int:
        """Time after which some series has ``lookback`` bars at each close."""
        return min(file.start(lookback) for file in self.files)

    def count(self, start: int) -> int:
        """Number of bars that close after ``start``."""
        return sum(file.count(start) for file in self.files)

    def events(self, start: int) -> Iterator[Update | InvalidFrame]:
        """Events received after ``start``, in order."""
        return merge(*(file.events(start) for file in self.files), key=received_at)

    def history(self, series: Series, start: int, end: int, now: int) -> Sequence[Candle]:
        """Bars with start <= open < end that were received closed by ``now``, ascending."""
        bars = {
            candle.time: candle
            for file in reversed(self.files)  # captured bars override those of candle files
            if series in file.series
            for candle in file.history(series, start, end, now)
        }
        return [bars[time] for time in sorted(bars)]


class ReplaySource:
    """Venue whose candles and history are those of a recording."""

    def __init__(
        self,
        recording: Recording,
        clock: Clock,
        start: int,
        *,
        advance_to: AdvanceTo | None = None,
        max_closes: int | None = None,
    ) -> None:
        """Events received by ``start``, UTC ms, are history; later ones are pushed.

        advance_to: waits for a time; default: the clock's ``sleep_until``. max_closes: end after
        this many times at which bars closed.
        """
        self.venue = recording.venue
        self.traits = recording.traits
        self._recording, self._clock, self._start = recording, clock, start
        self._advance_to = advance_to or clock.sleep_until
        self._max_closes = max_closes
        self._subscribed: frozenset[Series] = frozenset()

    async def unsupported(self, series: Collection[Series]) -> Mapping[Series, str]:
        recorded = self._recording.series
        has = ", ".join(sorted(one.name for one in recorded))
        return {one: f"not recorded; there are {has}" for one in series if one not in recorded}

    def subscribe(self, series: Collection[Series]) -> None:
        self._subscribed = frozenset(series)

    async def run(self, callbacks: SourceCallbacks) -> None:
        closes = 0
        for moment, events in groupby(self._recording.events(self._start), received_at):
            if closes == self._max_closes:
                return
            await self._advance_to(moment)
            closed = [self._push(callbacks, event) for event in events]
            closes += any(closed)

    async def history(self, series: Series, start: int, end: int) -> Sequence[Candle]:
        if start >= self._recording.end(series):
            # An empty result would mean intervals without trades, which are filled with flat bars.
            raise SourceError("its recording has ended", _NEVER_RETRY_SECONDS)
        return self._recording.history(series, start, end, self._clock.now())

    async def close(self) -> None:
        """Do nothing: no resources are held."""

    def _push(self, callbacks: SourceCallbacks, event: Update | InvalidFrame) -> bool:
        """Push an event; returns whether it closes a subscribed bar."""
        if isinstance(event, InvalidFrame):
            callbacks.reject(event.series, event.reason, event.raw)
            return False
        if event.series not in self._subscribed:
            return False
        callbacks.update(event)
        return event.closed
