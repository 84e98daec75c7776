"""The file sink: whole lines only, through crashes, rotation and full disks."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from kronos_connectors.jsonl import CONNECTOR, JsonlOptions
from kronos_stream.forecast.sink import Kind, Record, Sink, SinkUnavailable
from kronos_stream.market.clock import SystemClock


def sink(path: Path) -> Sink:
    return CONNECTOR.build(JsonlOptions(path=path), SystemClock(), Random(0))


def record(number: int, kind: Kind = "forecast") -> Record:
    return Record(number, kind, "v:A/B:1m", json.dumps({"n": number}).encode(), (), 0)


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


async def test_lines_are_appended_and_dead_letters_lie_apart(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.jsonl"
    first = sink(path)
    await first.start()
    assert await first.deliver([record(1), record(2, "deadletter"), record(3)]) == ()
    await first.close()
    second = sink(path)
    await second.start()
    await second.deliver([record(4)])
    await second.close()
    assert numbers(path) == [1, 3, 4]
    assert numbers(path.with_name("out.jsonl.deadletter")) == [2]


@pytest.mark.parametrize("length", [1, 70_000, 200_000])
async def test_a_torn_line_is_cut_off_at_the_start(tmp_path: Path, length: int) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": ' + b"2" * length)
    one = sink(path)
    await one.start()
    await one.deliver([record(3)])
    await one.close()
    assert numbers(path) == [1, 3]


async def test_a_file_of_one_torn_line_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"x" * 65_536)
    one = sink(path)
    await one.start()
    await one.close()
    assert path.read_bytes() == b""


async def test_rotation_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    one = sink(path)
    await one.start()
    await one.deliver([record(1)])
    path.rename(tmp_path / "out.jsonl.1")
    await one.deliver([record(2)])
    await one.close()
    assert numbers(tmp_path / "out.jsonl.1") == [1]
    assert numbers(path) == [2]


async def test_what_cannot_be_written_is_unavailable_and_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    one = sink(tmp_path / "folder")
    with pytest.raises(SinkUnavailable, match="folder"):
        await one.start()
    await one.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
async def test_a_full_disk_is_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.symlink_to("/dev/full")
    one = sink(path)
    with pytest.raises(SinkUnavailable):
        await one.deliver([record(1)])
    await one.close()
