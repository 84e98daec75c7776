"""A worker process as the daemon sees it: start, exchange messages, end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal, Self

import structlog

from kronos_stream.daemon.inference.backend import BatchResult, WorkerError
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
    decode_frame,
    encode_frame,
    split_chunks,
)

_log = structlog.get_logger()

_SETTINGS_PREFIX = "KRONOS_STREAM_"

_EXIT_TIMEOUT_SECONDS = 2.0

_MAX_LINE_BYTES = 2000
"""Longer lines of the worker's output are split."""


class WorkerCrashed(Exception):  # noqa: N818
    """The process exited or did not answer in time; it has been killed."""

    def __init__(self, cause: Literal["hang", "crash"]) -> None:
        super().__init__(cause)
        self.cause = cause


class WorkerProcess:
    """One worker process. Any failure of a call ends it."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        output_task: asyncio.Task[None],
    ) -> None:
        self._process = process
        self._reader, self._writer = reader, writer
        self._output_task = output_task

    @classmethod
    async def launch(cls, command: Sequence[str], threads: int) -> Self:
        """Start the process, which imports its modules and waits. Raises WorkerCrashed."""
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
                    # Ctrl-C must not reach the worker: the daemon may finish the current batch.
                    process_group=0,
                    env=_worker_environ(threads),
                )
            except OSError as error:  # for example no memory or process slot is free
                ours.close()
                _log.error("worker cannot be started", why=str(error))
                raise WorkerCrashed("crash") from error
        assert process.stdout is not None  # noqa: S101 - requested above
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return cls(process, reader, writer, asyncio.create_task(_forward_output(process.stdout)))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exited(self) -> bool:
        return self._process.returncode is not None

    async def wait(self) -> None:
        """Return when the process has exited."""
        await self._process.wait()

    async def load(self, config: ForecastConfig, seconds: float, *, measure: bool) -> ModelLoaded:
        """Load the model. Raises WorkerError for bad settings, and WorkerCrashed."""
        answer: ModelLoaded | LoadFailed
        async with self._killed_on_failure(seconds):
            self._writer.write(encode_frame(LoadModel(config, measure)))
            answer = await self._receive()
        if isinstance(answer, LoadFailed):
            await self.kill()
            raise WorkerError(answer.reason)
        return answer

    async def infer(self, requests: Sequence[InferenceRequest], seconds: float) -> BatchResult:
        """Run a batch. Raises WorkerCrashed."""
        results: list[InferenceResult | InferenceFailure] = []
        async with self._killed_on_failure(seconds):
            for chunk, is_last in split_chunks(requests):
                self._writer.write(encode_frame(RequestChunk(chunk, is_last)))
                await self._writer.drain()
                await asyncio.sleep(0)  # let other tasks run
            is_last = False
            while not is_last:
                part, is_last, duration = await self._receive()
                results += part
        return BatchResult(results, duration)

    async def close(self) -> None:
        """Ask the process to exit, and kill it if it does not; bounded in time."""
        self._writer.close()  # the worker exits at the end of its input
        with suppress(TimeoutError):
            async with asyncio.timeout(_EXIT_TIMEOUT_SECONDS):
                await self.wait()
        await self.kill()

    async def kill(self) -> None:
        """Kill the process if it runs, and release its resources; bounded in time."""
        if not self.exited:
            # Popen.kill would reap a process that has exited, and the event loop's child watcher
            # would miss its exit status.
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self._writer.close()
        try:
            async with asyncio.timeout(_EXIT_TIMEOUT_SECONDS):
                await self.wait()
                await self._output_task
        except TimeoutError:
            # Blocked in the kernel, most likely in a driver; it exits when that call returns.
            _log.error("worker does not exit after SIGKILL", pid=self.pid)

    @asynccontextmanager
    async def _killed_on_failure(self, seconds: float) -> AsyncIterator[None]:
        """Kill the process on a time-out, an error or cancellation. Raises WorkerCrashed."""
        cause: Literal["hang", "crash"]
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            cause = "hang"
        except (OSError, EOFError):
            cause = "crash"
        except asyncio.CancelledError:
            # Its answer would be taken for that of the next batch.
            await self.kill()
            raise
        else:
            return
        await self.kill()
        raise WorkerCrashed(cause)

    async def _receive(self) -> Any:  # noqa: ANN401 - the caller knows which message comes
        (length,) = FRAME_LENGTH.unpack(await self._reader.readexactly(FRAME_LENGTH.size))
        return decode_frame(await self._reader.readexactly(length))


def _worker_environ(threads: int) -> dict[str, str]:
    """Environment of the worker: without our settings, which may contain passwords."""
    others = {k: v for k, v in os.environ.items() if not k.upper().startswith(_SETTINGS_PREFIX)}
    return others | {"OMP_NUM_THREADS": str(threads)}


async def _forward_output(output: asyncio.StreamReader) -> None:
    """Log the lines that the worker prints, mostly warnings of libraries."""
    rest = b""
    while chunk := await output.read(_MAX_LINE_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            lines, rest = [*lines, rest], b""
        for line in lines:
            if line.strip():
                _log.info("worker output", line=line.decode(errors="replace").rstrip())
