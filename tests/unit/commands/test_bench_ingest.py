"""The measured way of a frame is the real one; its speed is watched, generously."""

from __future__ import annotations

from kronos_stream.commands._bench_ingest import measure


def test_kline_frames_are_taken_in_fast_enough() -> None:
    ingest = measure(0.4)
    assert ingest.frames >= 6_000
    assert ingest.floor > ingest.decoded > ingest.taken_in >= ingest.saved
    # Half the floor that is promised, on whatever machine this is.
    assert ingest.taken_in > 25_000
