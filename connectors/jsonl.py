"""Sink that appends forecasts to a file, one JSON object per line."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from errno import EINVAL
from functools import partial
from io import BufferedRandom
from pathlib import Path
from random import Random
from typing import Annotated

import orjson
import structlog
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from kronos_stream.interfaces.diagnostics import Check, Finding
from kronos_stream.interfaces.probes import check_disk, run_in_thread
from kronos_stream.interfaces.sink import (
    Record,
    RecordKind,
    Refusal,
    SinkConnector,
    SinkUnavailable,
)
from kronos_stream.market.clock import Clock

_log = structlog.get_logger()

_BLOCK = 65_536


def _validate_path(path: Path) -> Path:
    path = path.expanduser()
    if not path.name or path.is_dir():
        raise ValueError(f"{path} is a folder: name a file, such as forecasts.jsonl")
    return path


class JsonlOptions(BaseModel):
    """Settings of the file sink."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    path: Annotated[Path, AfterValidator(_validate_path)] = Field(examples=["forecasts.jsonl"])
    """File that forecasts are appended to; dead letters go to PATH.deadletter. Log rotation may
    rename or delete them at any time."""
    sync: bool = True
    """Wait for the disk after each batch, so that a power cut loses no line."""


class JsonlSink:
    """Appends the values of records; they contain the key and headers, too."""

    name = "jsonl"

    def __init__(self, options: JsonlOptions) -> None:
        path = options.path
        self._paths: dict[RecordKind, Path] = {
            "forecast": path,
            "removal": path,
            "deadletter": path.with_name(f"{path.name}.deadletter"),
        }
        self._sync = options.sync
        self._thread = ThreadPoolExecutor(1, "jsonl")

    def checks(self) -> Sequence[Check]:
        async def check() -> Sequence[Finding]:
            disk = partial(check_disk, self._paths["forecast"], "KRONOS_STREAM_JSONL__PATH")
            return [await run_in_thread(disk)]

        return [Check("jsonl file", check)]

    async def start(self) -> None:
        """Check that the files can be written, and repair a last line left by a crash."""
        await self._run_in_thread(self._prepare)

    async def deliver(self, records: Sequence[Record]) -> Sequence[Refusal]:
        lines: dict[Path, list[bytes]] = {}
        for record in records:
            # JSON strings have no raw line breaks, so these are between tokens.
            line = record.value.replace(b"\n", b" ") + b"\n"
            lines.setdefault(self._paths[record.kind], []).append(line)
        for path, parts in lines.items():
            await self._run_in_thread(partial(self._append, path, b"".join(parts)))
        return ()

    async def close(self) -> None:
        self._thread.shutdown(wait=False)

    async def _run_in_thread(self, work: Callable[[], None]) -> None:
        """Run in the single thread: a cancelled write ends before the next one begins."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except OSError as error:
            raise SinkUnavailable(f"{error.filename}: {error.strerror}") from error

    def _prepare(self) -> None:
        for path in self._paths.values():
            _repair(path)

    def _append(self, path: Path, lines: bytes) -> None:
        # Opened for each write: log rotation may have moved the file.
        with path.open("ab", buffering=0) as file:
            start = file.tell()
            try:
                rest = memoryview(lines)
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError as error:
                os.ftruncate(file.fileno(), start)  # a full disk must not leave an incomplete line
                error.filename = str(path)
                raise
            if self._sync:
                os.fsync(file.fileno())
        if self._sync and not start:
            _fsync_directory(path.parent)


def _repair(path: Path) -> None:
    """Create the file, or repair its last line.

    An incomplete record is cut off, as it will be delivered again. Any other unfinished line, which
    may be of another program, gets a line break.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise OSError(EINVAL, "not an ordinary file", str(path))
    with path.open("ab+") as file:
        end = file.tell()
        start = _last_line_start(file, end)
        file.seek(start)
        line = file.read(end - start)
        if not line:
            return
        if line.startswith((b"{", b"\0")) and not _is_json(line):
            _log.warning("incomplete line cut off", path=str(path), bytes=len(line))
            file.truncate(start)
        else:
            file.write(b"\n")


def _last_line_start(file: BufferedRandom, end: int) -> int:
    """Offset after the last line break."""
    start = end
    while start:
        block = max(0, start - _BLOCK)
        file.seek(block)
        found = file.read(start - block).rfind(b"\n")
        if found >= 0:
            return block + found + 1
        start = block
    return 0


def _is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def _fsync_directory(folder: Path) -> None:
    """Make the directory entry of a new file durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def build(options: JsonlOptions, _clock: Clock, _random: Random) -> JsonlSink:
    """Create a sink; files are opened when it starts."""
    return JsonlSink(options)


CONNECTOR = SinkConnector(JsonlOptions, build)
