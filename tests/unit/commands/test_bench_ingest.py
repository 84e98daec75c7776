"""The intake benchmark processes frames, at a rate in proportion to that of JSON parsing."""

from __future__ import annotations

from kronos_stream.commands._bench_ingest import measure


def test_kline_frames_are_processed_fast_enough() -> None:
    rates = measure(0.4)
    assert rates.frames >= 6_000
    assert rates.floor > rates.decoded > rates.taken_in >= rates.saved
    # About 8 on any machine; `make bench` shows the absolute rates.
    assert rates.floor / rates.taken_in < 20
