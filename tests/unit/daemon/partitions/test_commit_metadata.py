"""What is noted of a part comes back, and never grows beyond what a broker takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronos_stream.daemon.partitions.commit_metadata import (
    CommitMetadata,
    decode_metadata,
    encode_metadata,
)

_MOST = 4_096
"""``offset.metadata.max.bytes`` of a broker that was not told otherwise."""


@given(st.integers(0, 2**62), st.integers(2, 4_096), st.sets(st.integers(1, 300), max_size=200))
def test_what_is_noted_comes_back(base: int, bars: int, done: set[int]) -> None:
    kept = CommitMetadata(base // 2, bars, {base + one for one in done})
    assert decode_metadata(encode_metadata(kept, base), base) == kept


def test_what_is_too_long_is_left_out_from_its_end() -> None:
    done = set(range(1_000_000, 1_010_000, 2))
    text = encode_metadata(CommitMetadata(7, 488, done), 999_000)
    assert len(text.encode()) <= _MOST
    kept = decode_metadata(text, 999_000)
    assert kept is not None
    assert len(kept.done_offsets) > 500
    assert kept.done_offsets == set(sorted(done)[: len(kept.done_offsets)])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"start":1}',
        "\x00",
        '{"v":1,"start":1,"bars":2,"done":"x-"}',
        '{"v":2,"start":1,"bars":2,"done":""}',
        '{"v":1,"start":6,"bars":2,"done":""}',
        '{"v":1,"start":0,"bars":2,"done":"0-99999999999999999999"}',
        '{"v":1,"start":0,"bars":2,"done":"1-900000,1000000-1900000"}',
    ],
)
def test_a_note_of_somebody_else_is_no_note(text: str) -> None:
    assert decode_metadata(text, 5) is None
