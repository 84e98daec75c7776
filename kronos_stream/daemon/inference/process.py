"""The worker process seen from the daemon: started, spoken to, ended."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, Literal, Self, TypeVar

import structlog

from kronos_stream.daemon.inference.protocol import (
    FRAME_LENGTH,
    ForecastConfig,
    InferenceFailure,
    InferenceRequest,
    InferenceResult,
    LoadFailed,
    LoadModel,
    ModelLoaded,
    RequestChunk,
    ResultChunk,
    decode_frame,
    encode_frame,
)

_T = TypeVar("_T")

_log = structlog.get_logger()

_SETTINGS_PREFIX = "KRONOS_STREAM_"

_CHUNK_SIZE = 32
"""Tasks per frame."""

_EXIT_TIMEOUT_SECONDS = 2.0

_MAX_LINE_BYTES = 2000
"""Bytes after which a line of the worker's output is broken."""


class WorkerError(Exception):
    """The model or its settings cannot be used; the message is for the user."""


class WorkerCrashed(Exception):  # noqa: N818
    """The process did not answer in time, or died."""

    def __init__(self, cause: Literal["hang", "crash"]) -> None:
        super().__init__(cause)
        self.cause = cause


class WorkerProcess:
    """One worker process. Whatever goes wrong with it, it is ended."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        relay: asyncio.Task[None],
    ) -> None:
        self._process = process
        self._reader, self._writer = reader, writer
        self._output_task = relay

    @classmethod
    async def launch(cls, command: Sequence[str], threads: int) -> Self:
        """Start the process; it imports what it needs and waits to load. Raises Broken."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    pass_fds=(theirs.fileno(),),
                    # Ctrl-C is for the daemon to judge: it may want the batch in hand.
                    process_group=0,
                    env=_worker_environ(threads),
                )
            except OSError as error:  # no memory or no number left for a process, just now
                ours.close()
                _log.error("worker cannot be started", why=str(error))
                raise WorkerCrashed("crash") from error
        assert process.stdout is not None  # noqa: S101 - asked for above
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return cls(process, reader, writer, asyncio.create_task(_forward_output(process.stdout)))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exited(self) -> bool:
        return self._process.returncode is not None

    async def wait(self) -> None:
        """Until it is dead."""
        await self._process.wait()

    async def load(self, config: ForecastConfig, seconds: float, *, measure: bool) -> ModelLoaded:
        """Have it load the model. Raises WorkerError for what the user can mend, and Broken."""
        answer = await self._with_timeout(self._load(LoadModel(config, measure)), seconds)
        if isinstance(answer, LoadFailed):
            await self.kill()
            raise WorkerError(answer.reason)
        return answer

    async def infer(
        self, requests: Sequence[InferenceRequest], seconds: float
    ) -> tuple[list[InferenceResult | InferenceFailure], float]:
        """One result per task, and the seconds that drawing took. Raises Broken."""
        return await self._with_timeout(self._infer(requests), seconds)

    async def close(self) -> None:
        """Let it end; bounded."""
        self._writer.close()  # which it reads as the end of its work
        with suppress(TimeoutError):
            async with asyncio.timeout(_EXIT_TIMEOUT_SECONDS):
                await self.wait()
        await self.kill()

    async def kill(self) -> None:
        """Kill it, if it lives, and let go of it; bounded."""
        if not self.exited:
            # Not Popen.kill: it looks first whether the process is dead, and then the loop's own
            # watcher does not learn how it ended.
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self._writer.close()
        try:
            async with asyncio.timeout(_EXIT_TIMEOUT_SECONDS):
                await self.wait()
                await self._output_task
        except TimeoutError:
            # Held by the kernel, a driver's fault most likely: it ends when that lets go.
            _log.error("worker does not die", pid=self.pid)

    async def _with_timeout(self, work: Coroutine[Any, Any, _T], seconds: float) -> _T:
        """What ``work`` returns in time; if it does not, or is cancelled, the process is ended."""
        cause: Literal["hang", "crash"]
        try:
            async with asyncio.timeout(seconds):
                return await work
        except TimeoutError:
            cause = "hang"
        except (OSError, EOFError):
            cause = "crash"
        except asyncio.CancelledError:
            # A worker that computes for nobody is of no use.
            await self.kill()
            raise
        await self.kill()
        raise WorkerCrashed(cause)

    async def _load(self, load: LoadModel) -> ModelLoaded | LoadFailed:
        self._writer.write(encode_frame(load))
        answer: ModelLoaded | LoadFailed = await self._receive()
        return answer

    async def _infer(
        self, requests: Sequence[InferenceRequest]
    ) -> tuple[list[InferenceResult | InferenceFailure], float]:
        for first in range(0, len(requests), _CHUNK_SIZE):
            piece = list(requests[first : first + _CHUNK_SIZE])
            self._writer.write(
                encode_frame(RequestChunk(piece, first + _CHUNK_SIZE >= len(requests)))
            )
            await self._writer.drain()
            await asyncio.sleep(0)  # others have their turn
        results: list[InferenceResult | InferenceFailure] = []
        while True:
            done: ResultChunk = await self._receive()
            results += done.results
            if done.is_last:
                return results, done.seconds

    async def _receive(self) -> Any:  # noqa: ANN401 - whatever the worker says
        (length,) = FRAME_LENGTH.unpack(await self._reader.readexactly(FRAME_LENGTH.size))
        return decode_frame(await self._reader.readexactly(length))


def _worker_environ(threads: int) -> dict[str, str]:
    """Ours without the settings: a worker is told what it needs, and passwords are not among it."""
    others = {k: v for k, v in os.environ.items() if not k.upper().startswith(_SETTINGS_PREFIX)}
    return others | {"OMP_NUM_THREADS": str(threads)}


async def _forward_output(output: asyncio.StreamReader) -> None:
    """What the worker prints, libraries' warnings mostly, goes to the log."""
    rest = b""
    while chunk := await output.read(_MAX_LINE_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            lines, rest = [*lines, rest], b""
        for line in lines:
            if line.strip():
                _log.info("worker says", line=line.decode(errors="replace").rstrip())
