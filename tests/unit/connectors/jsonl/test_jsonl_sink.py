"""The file sink: whole lines only, through crashes, rotation and full disks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from kronos_connectors.jsonl import CONNECTOR, JsonlOptions
from kronos_stream.interfaces.sink import Record, RecordKind, Sink, SinkUnavailable
from kronos_stream.market.clock import SystemClock


def sink(path: Path) -> Sink:
    return CONNECTOR.build(JsonlOptions(path=path), SystemClock(), Random(0))


def record(number: int, kind: RecordKind = "forecast") -> Record:
    return Record(number, kind, "v:A/B:1m", json.dumps({"n": number}).encode(), (), 0)


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


async def test_lines_are_appended_and_dead_letters_kept_apart(tmp_path: Path) -> None:
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
async def test_incomplete_line_is_cut_off_at_the_start(tmp_path: Path, length: int) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": ' + b"2" * length)
    one = sink(path)
    await one.start()
    await one.deliver([record(3)])
    await one.close()
    assert numbers(path) == [1, 3]


@pytest.mark.parametrize(
    ("left", "mended"),
    [
        (b'{"n": 1', b""),
        (b'{"n": 1}\n\0\0\0\0', b'{"n": 1}\n'),  # as a power cut may leave it
        (b'{"n": 1}', b'{"n": 1}\n'),  # whole but for its end: nothing is lost
        (b"x" * 65_536, b"x" * 65_536 + b"\n"),  # not ours: nothing is cut
        (b"", b""),
    ],
)
async def test_last_line_is_repaired_at_the_start(
    tmp_path: Path, left: bytes, mended: bytes
) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(left)
    one = sink(path)
    await one.start()
    await one.close()
    assert path.read_bytes() == mended


async def test_value_with_line_breaks_becomes_one_line(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    one = sink(path)
    await one.start()
    await one.deliver([record(1)._replace(value=b'{\n "n": 5\n}'), record(2)])
    await one.close()
    assert numbers(path) == [5, 2]


_VICTIM = """
import asyncio, sys
from pathlib import Path
from random import Random
from kronos_connectors.jsonl import CONNECTOR, JsonlOptions
from kronos_stream.interfaces.sink import Record, SinkUnavailable
from kronos_stream.market.clock import SystemClock

async def main():
    sink = CONNECTOR.build(JsonlOptions(path=Path(sys.argv[1])), SystemClock(), Random(0))
    await sink.start()
    for i in range(1_000_000):
        value = b'{"n": %d, "pad": "%s"}' % (i, b"." * 20_000)
        try:
            await sink.deliver([Record(i, "forecast", "k", value, (), 0)])
        except SinkUnavailable as error:
            await sink.close()
            sys.exit(str(error))
        print(i, flush=True)

asyncio.run(main())
"""


async def test_delivered_lines_survive_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    command = [sys.executable, "-c", _VICTIM, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as victim:  # noqa: ASYNC220, S603
        assert victim.stdout is not None
        for _ in range(30):
            delivered = int(victim.stdout.readline())
        victim.kill()
        rest = victim.stdout.read().split(b"\n")[:-1]
    delivered = int(rest[-1]) if rest else delivered
    restarted = sink(path)
    await restarted.start()
    await restarted.close()
    assert numbers(path)[: delivered + 1] == list(range(delivered + 1))


async def test_full_disk_leaves_complete_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    shell = ["bash", "-c", 'ulimit -f 300; exec "$0" "$@"']  # no file above 300 kB
    done = subprocess.run(  # noqa: ASYNC221, S603
        [*shell, sys.executable, "-c", _VICTIM, str(path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == f"{path}: File too large"
    assert numbers(path) == list(range(len(done.stdout.splitlines())))
    assert path.stat().st_size > 250_000


async def test_log_rotation_is_supported(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    one = sink(path)
    await one.start()
    await one.deliver([record(1)])
    path.rename(tmp_path / "out.jsonl.1")
    await one.deliver([record(2)])
    await one.close()
    assert numbers(tmp_path / "out.jsonl.1") == [1]
    assert numbers(path) == [2]


async def test_unwritable_file_is_unavailable_and_named(tmp_path: Path) -> None:
    path = tmp_path / "file" / "out.jsonl"
    one = sink(path)
    path.parent.write_text("in the way")
    with pytest.raises(SinkUnavailable, match="file"):
        await one.start()
    path.parent.unlink()
    await one.start()
    await one.deliver([record(1)])
    await one.close()
    assert numbers(path) == [1]


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_folder_is_rejected_in_the_settings(name: str) -> None:
    with pytest.raises(ValueError, match="is a folder: name a file"):
        JsonlOptions(path=Path(name))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
async def test_full_disk_is_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.symlink_to("/dev/full")
    one = sink(path)
    with pytest.raises(SinkUnavailable):
        await one.deliver([record(1)])
    await one.close()
