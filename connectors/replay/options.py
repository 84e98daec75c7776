"""Settings of the venue replay of ``kronos-stream run``: ``KRONOS_STREAM_REPLAY__*``."""

from __future__ import annotations

from random import Random

from pydantic import BaseModel, ConfigDict, Field

from kronos_stream.interfaces.source import Source
from kronos_stream.market.clock import Clock


class ReplayOptions(BaseModel):
    """Settings of recorded candles that are replayed from now on, at their original speed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    files: tuple[str, ...] = Field(min_length=1)
    """Candle files, each FILE or SERIES=FILE, such as replay:ETH/BTC=eth.csv.gz."""
    history: int = Field(488, ge=1)
    """Bars of each file that are history at the start; the next bar closes first."""


def build(_: str, options: ReplayOptions, clock: Clock, random: Random) -> Source:  # noqa: ARG001
    """Create a source with candles moved to the present, by whole bars of the longest timeframe.

    Raises CandleFileError.
    """
    # Imported here: --help reads the options, and pandas takes a second to import.
    from kronos_connectors.replay.candles import CandleFile
    from kronos_connectors.replay.recordings import FileSpec
    from kronos_connectors.replay.source import Recording, ReplaySource
    from kronos_stream.market.candle_files import CandleFileError

    recorded = [CandleFile.read(FileSpec.parse(text)) for text in options.files]
    start = Recording(recorded, []).start(options.history + 1)
    for file in recorded:
        if file.only_series.timeframe.milliseconds is None:
            raise CandleFileError(f"{file.path}: months cannot be moved; use kronos-stream replay")
    step = max(file.only_series.timeframe.min_milliseconds for file in recorded)
    moved = (clock.now() - start) // step * step
    recording = Recording([file.shifted(moved) for file in recorded], [])
    return ReplaySource(recording, clock, start + moved)
