"""Forecasts into a file: one JSON object per line, appended."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from kronos_stream.forecast.sink import Kind, Record, Refusal, SinkConnector, SinkUnavailable
from kronos_stream.market.clock import Clock

_T = TypeVar("_T")

_BLOCK = 65_536


class JsonlOptions(BaseModel):
    """``KRONOS_STREAM_JSONL__*``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path = Field(description="file for forecasts; dead letters go to <path>.deadletter")
    sync: bool = Field(
        default=False, description="wait for the disk: what is delivered survives a power cut"
    )


class JsonlSink:
    """Appends each record's value as a line; follows a file that is renamed away and made anew."""

    name = "jsonl"

    def __init__(self, options: JsonlOptions) -> None:
        path = options.path.expanduser()
        self._paths: dict[Kind, Path] = {
            "forecast": path,
            "deadletter": path.with_name(f"{path.name}.deadletter"),
        }
        self._sync = options.sync
        self._thread = ThreadPoolExecutor(1, "jsonl")

    async def start(self) -> None:
        """See that the files can be written, and end a line that a crash left unfinished."""
        await self._call(lambda: [_heal(path) for path in self._paths.values()])

    async def deliver(self, records: Sequence[Record]) -> Sequence[Refusal]:
        lines: dict[Path, list[bytes]] = {}
        for record in records:
            lines.setdefault(self._paths[record.kind], []).append(record.value + b"\n")
        await self._call(
            lambda: [self._append(path, b"".join(some)) for path, some in lines.items()]
        )
        return ()

    async def close(self) -> None:
        self._thread.shutdown(wait=False)

    async def _call(self, work: Callable[[], _T]) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except OSError as error:
            raise SinkUnavailable(f"{error.filename or 'file'}: {error.strerror}") from error

    def _append(self, path: Path, lines: bytes) -> None:
        # Opened anew each time: log rotation may have taken the file away.
        with path.open("ab") as file:
            start = file.tell()
            try:
                file.write(lines)
                file.flush()
            except OSError:
                os.truncate(path, start)  # a disk that is full must not leave half a line
                raise
            if self._sync:
                os.fsync(file.fileno())


def _heal(path: Path) -> None:
    """Make the file, or cut off what a crash left of a line: its record comes again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        end = file.tell()
        while end:
            start = max(0, end - _BLOCK)
            file.seek(start)
            whole = file.read(end - start).rfind(b"\n") + 1
            if whole or not start:
                file.truncate(start + whole)
                return
            end = start


def build(options: JsonlOptions, _clock: Clock, _random: Random) -> JsonlSink:
    """A sink; nothing is opened yet."""
    return JsonlSink(options)


CONNECTOR = SinkConnector(JsonlOptions, build)
