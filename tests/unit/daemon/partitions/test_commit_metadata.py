"""Commit metadata: encoding, decoding, and its length limit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronos_stream.daemon.partitions.commit_metadata import (
    CommitMetadata,
    decode_metadata,
    encode_metadata,
)

_MAX_BYTES = 4_096
"""Default of a broker's ``offset.metadata.max.bytes``."""


@given(st.integers(0, 2**62), st.integers(2, 4_096), st.sets(st.integers(1, 300), max_size=200))
def test_decoding_returns_the_encoded_metadata(base: int, bars: int, done: set[int]) -> None:
    metadata = CommitMetadata(base // 2, bars, {base + one for one in done})
    assert decode_metadata(encode_metadata(metadata, base), base) == metadata


def test_metadata_that_is_too_long_omits_the_last_offsets() -> None:
    done = set(range(1_000_000, 1_010_000, 2))
    text = encode_metadata(CommitMetadata(7, 488, done), 999_000)
    assert len(text.encode()) <= _MAX_BYTES
    metadata = decode_metadata(text, 999_000)
    assert metadata is not None
    assert len(metadata.done_offsets) > 500
    assert metadata.done_offsets == set(sorted(done)[: len(metadata.done_offsets)])


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
def test_text_of_another_format_is_ignored(text: str) -> None:
    assert decode_metadata(text, 5) is None
