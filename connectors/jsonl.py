"""Forecasts into a file: one JSON object per line, appended, only whole lines."""

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
from pydantic import AfterValidator, BaseModel, ConfigDict

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

    path: Annotated[Path, AfterValidator(_validate_path)]
    """File that forecasts are appended to; dead letters go to PATH.deadletter. Log rotation may
    take either away at any time."""
    sync: bool = True
    """Wait for the disk after each batch, so that a power cut loses no line."""


class JsonlSink:
    """A line is a record's value as it is; its key and its headers are in there, too."""

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
        async def look() -> Sequence[Finding]:
            disk = partial(check_disk, self._paths["forecast"], "KRONOS_STREAM_JSONL__PATH")
            return [await run_in_thread(disk)]

        return [Check("jsonl file", look)]

    async def start(self) -> None:
        """See that the files can be written, and mend what a crash left unfinished."""
        await self._run_in_thread(self._prepare)

    async def deliver(self, records: Sequence[Record]) -> Sequence[Refusal]:
        lines: dict[Path, list[bytes]] = {}
        for record in records:
            # Strings in JSON have no raw line breaks, so any is between tokens.
            line = record.value.replace(b"\n", b" ") + b"\n"
            lines.setdefault(self._paths[record.kind], []).append(line)
        for path, some in lines.items():
            await self._run_in_thread(partial(self._append, path, b"".join(some)))
        return ()

    async def close(self) -> None:
        self._thread.shutdown(wait=False)

    async def _run_in_thread(self, work: Callable[[], None]) -> None:
        """One thread, so that a write that nobody waits for any more is over before the next."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except OSError as error:
            raise SinkUnavailable(f"{error.filename}: {error.strerror}") from error

    def _prepare(self) -> None:
        for path in self._paths.values():
            _repair(path)

    def _append(self, path: Path, lines: bytes) -> None:
        # Opened anew each time: log rotation may have taken the file away.
        with path.open("ab", buffering=0) as file:
            start = file.tell()
            try:
                rest = memoryview(lines)
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError as error:
                os.ftruncate(file.fileno(), start)  # a full disk must not leave half a line behind
                error.filename = str(path)
                raise
            if self._sync:
                os.fsync(file.fileno())
        if self._sync and not start:
            _fsync_directory(path.parent)


def _repair(path: Path) -> None:
    """Make the file, or mend its last line.

    What a crash left of a record's line is cut off, for the record comes again; anything else
    without an end, which may be somebody else's, is given one.
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
            _log.warning("unfinished line cut off", path=str(path), bytes=len(line))
            file.truncate(start)
        else:
            file.write(b"\n")


def _last_line_start(file: BufferedRandom, end: int) -> int:
    """Where what follows the last line break begins."""
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
    """Make the name of a new file last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def build(options: JsonlOptions, _clock: Clock, _random: Random) -> JsonlSink:
    """A sink; nothing is opened yet."""
    return JsonlSink(options)


CONNECTOR = SinkConnector(JsonlOptions, build)
