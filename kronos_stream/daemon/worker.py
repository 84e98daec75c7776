"""The worker seen from the daemon: a process that draws, watched, killed and replaced.

The event loop never waits for it: all that passes between the two is asynchronous and in pieces.
A batch that is not done by its deadline, or whose worker dies, is tried again on a new worker;
what fails again is halved, until the one context that brings workers down stands alone.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import structlog

from kronos_stream.daemon.job import (
    LENGTH,
    Done,
    Drawn,
    Failed,
    Identity,
    Job,
    Load,
    Plan,
    Ready,
    Refused,
    Task,
    frame,
    unframe,
)
from kronos_stream.daemon.metrics import Metrics

if TYPE_CHECKING:
    from kronos_stream.market.contexts import Window

_log = structlog.get_logger()

_COMMAND = (sys.executable, "-m", "kronos_stream.daemon.worker_main")

_PIECE = 32
"""Windows per frame."""

_ATTEMPTS = 2
"""How often a batch is tried whole."""

_SHORTEST_SECONDS = 2.0
"""No part of a batch gets less time, however often it was halved."""

_QUARANTINE_SECONDS = 300.0
"""A series that brought the worker down by itself fails at once for so long."""

_STARTS = 5
"""Failed starts in a row after which the worker is given up."""

_START_SECONDS = 120.0
_FIRST_START_SECONDS = 900.0
"""The first may fetch a model."""

_CLOSE_SECONDS = 2.0

_FADING = 0.8
"""What a measurement counts for after one more batch."""

_LINE = 2000


class WorkerError(Exception):
    """The model or its settings cannot be used; the message is for the user."""


class WorkerLost(Exception):  # noqa: N818
    """The worker does not start any more, whatever is tried."""


class Batch(NamedTuple):
    """What became of the windows given, in their order."""

    results: list[Drawn | Failed]
    seconds: float
    """What drawing them took in the worker."""


class _Broken(Exception):  # noqa: N818
    """An attempt cost the worker."""

    def __init__(self, cause: Literal["hang", "crash"]) -> None:
        super().__init__(cause)
        self.cause = cause


@dataclass(slots=True)
class _Child:
    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    relay: asyncio.Task[None]


class Worker:
    """One worker process, replaced when it hangs or dies. One batch at a time."""

    def __init__(
        self,
        plan: Plan,
        metrics: Metrics,
        *,
        standby: bool = False,
        command: Sequence[str] = _COMMAND,
    ) -> None:
        """``command`` is called with the number of the descriptor to talk over.

        standby: keep a second process that has imported everything but loaded nothing. It costs
            280 MB and saves most of the time that replacing a worker takes.
        """
        self._plan = plan
        self._metrics = metrics
        self._command = command
        self._standby = standby
        self._child: _Child | None = None
        self._spare: _Child | None = None
        self._one_at_a_time = asyncio.Lock()
        self._series, self._seconds = 0.0, 0.0
        self._quarantine: dict[str, float] = {}

    @property
    def pid(self) -> int | None:
        """The process, None while there is none."""
        return None if self._child is None else self._child.process.pid

    def healthy(self) -> str:
        """Why nothing can be forecast just now; empty if it can."""
        return "the worker is starting" if self._child is None else ""

    async def start(self) -> Identity:
        """Load the model and measure its speed.

        Raises WorkerError for what the user can mend, WorkerLost where the process does not live.
        """
        try:
            ready = await self._spawn(_FIRST_START_SECONDS, measure=True)
        except _Broken as broken:
            raise WorkerLost(f"the worker did not start ({broken.cause}); see its log") from None
        self._learn(ready.series, ready.seconds)
        _log.info(
            "worker ready",
            model=ready.identity.model,
            device=ready.identity.device,
            dtype=ready.identity.dtype,
            threads=self._plan.threads,
            milliseconds_per_series=round(1000 * self.expected(1), 2),
        )
        return ready.identity

    def expected(self, series: int) -> float:
        """Seconds that forecasting so many series takes, by what was measured lately."""
        return series * self._seconds / self._series if self._series else 0.0

    def capacity(self, seconds: float) -> int:
        """How many series can be forecast in so long; at least one."""
        one = self.expected(1)
        return max(1, int(min(seconds / one, 1e9))) if one else 1

    async def forecast(self, windows: Sequence[Window], deadline: float) -> Batch:
        """Forecast from each of ``windows``; ``deadline`` seconds are given to each attempt.

        A window that cannot be forecast, or that alone costs the worker, is Failed; the others
        are not touched by it. Raises WorkerLost.
        """
        async with self._one_at_a_time:
            results: dict[int, Drawn | Failed] = {}
            now = asyncio.get_running_loop().time()
            self._quarantine = {name: t for name, t in self._quarantine.items() if t > now}
            healthy = []
            for i, window in enumerate(windows):
                if window.series.name in self._quarantine:
                    results[i] = Failed("its last context stopped the worker")
                else:
                    healthy.append(i)
            seconds = await self._draw(windows, healthy, deadline, _ATTEMPTS, results)
            return Batch([results[i] for i in range(len(windows))], seconds)

    async def run(self) -> None:
        """Replace the worker also when it dies between batches; until cancelled."""
        while True:
            if self._child is not None:
                await self._child.process.wait()
            async with self._one_at_a_time:
                await self._living()

    async def close(self) -> None:
        """End the process; bounded. Only when nothing else of this worker runs any more."""
        if self._spare is not None:
            await _end(self._spare)
            self._spare = None
        if self._child is None:
            return
        # It ends when our end of the socket does.
        self._child.writer.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._child.process.wait()
        await self._bury()

    async def _draw(
        self,
        windows: Sequence[Window],
        part: Sequence[int],
        deadline: float,
        attempts: int,
        results: dict[int, Drawn | Failed],
    ) -> float:
        """Fill in ``results`` of the windows numbered in ``part``; the seconds that it took."""
        if not part:
            return 0.0
        cause = ""
        for _ in range(attempts):
            try:
                drawn = await self._attempt([windows[i] for i in part], deadline)
            except _Broken as broken:
                cause = broken.cause
                continue
            results.update(zip(part, drawn.results, strict=True))
            return drawn.seconds
        if len(part) == 1:
            name = windows[part[0]].series.name
            now = asyncio.get_running_loop().time()
            self._quarantine[name] = now + _QUARANTINE_SECONDS
            results[part[0]] = Failed(f"brings down the worker ({cause})")
            return 0.0
        # An honest half takes half the time.
        deadline = max(deadline / 2, _SHORTEST_SECONDS)
        middle = len(part) // 2
        return sum(
            [
                await self._draw(windows, half, deadline, 1, results)
                for half in (part[:middle], part[middle:])
            ]
        )

    async def _attempt(self, windows: Sequence[Window], deadline: float) -> Batch:
        """One try on a living worker; _Broken if it costs the worker."""
        child = await self._living()
        done = False
        cause: Literal["hang", "crash"]
        try:
            async with asyncio.timeout(deadline):
                await _give(child, windows)
                batch = await _take(child)
            done = True
        except TimeoutError:
            cause = "hang"
            self._learn(len(windows), deadline)
        except (OSError, EOFError):
            cause = "crash"
        finally:
            # Also when we are cancelled: a worker that computes for nobody is of no use.
            if not done:
                await self._bury()
        if not done:
            self._metrics.worker_restarts.labels(cause).inc()
            _log.warning("worker lost", cause=cause, series=len(windows), deadline=deadline)
            raise _Broken(cause)
        self._learn(len(windows), batch.seconds)
        return batch

    def _learn(self, series: int, seconds: float) -> None:
        self._series = _FADING * self._series + series
        self._seconds = _FADING * self._seconds + seconds

    async def _living(self) -> _Child:
        """The worker; a new one where there is none."""
        if self._child is not None and self._child.process.returncode is not None:
            self._metrics.worker_restarts.labels("crash").inc()
            _log.warning("worker found dead", status=self._child.process.returncode)
            await self._bury()
        for failed in range(_STARTS):
            if self._child is not None:
                return self._child
            if failed:
                await asyncio.sleep(2.0 ** (failed - 2))
            try:
                ready = await self._spawn(_START_SECONDS, measure=False)
                _log.info("worker replaced", device=ready.identity.device)
            except (_Broken, WorkerError) as error:
                _log.error("worker did not start", why=str(error))
        if self._child is None:
            raise WorkerLost(f"the worker failed to start {_STARTS} times; see its log")
        return self._child

    async def _spawn(self, seconds: float, *, measure: bool) -> Ready:
        """Have a process that is ready. Raises WorkerError and _Broken."""
        child, self._spare = self._spare, None
        if child is not None and child.process.returncode is not None:
            await _end(child)
            child = None
        ready = await self._load(child or await self._launch(), seconds, measure=measure)
        if self._standby:
            self._spare = await self._launch()
        return ready

    async def _launch(self) -> _Child:
        """Start a process; it imports what it needs and waits."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                # Ctrl-C is for the daemon to judge: it may want the batch in hand.
                process_group=0,
                env=os.environ | {"OMP_NUM_THREADS": str(self._plan.threads)},
            )
        assert process.stdout is not None  # noqa: S101 - asked for above
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return _Child(process, reader, writer, asyncio.create_task(_relay(process.stdout)))

    async def _load(self, child: _Child, seconds: float, *, measure: bool) -> Ready:
        """Have ``child`` load the model; it is the worker then, or it is ended."""
        answer: Any = None
        cause: Literal["hang", "crash"] = "crash"
        try:
            async with asyncio.timeout(seconds):
                child.writer.write(frame(Load(self._plan, measure)))
                answer = await _read(child)
        except TimeoutError:
            cause = "hang"
        except (OSError, EOFError):
            cause = "crash"
        finally:
            if not isinstance(answer, Ready):
                await _end(child)
        if isinstance(answer, Refused):
            raise WorkerError(answer.reason)
        if not isinstance(answer, Ready):
            raise _Broken(cause)
        self._child = child
        return answer

    async def _bury(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await _end(child)


def usable_cores() -> int:
    """Processors this process may keep busy, by its affinity and its control group's quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


async def _end(child: _Child) -> None:
    """Kill the process, if it lives, and let go of it; bounded."""
    if child.process.returncode is None:
        # Not Popen.kill: it looks first whether the process is dead, and then the loop's own
        # watcher does not learn how it ended.
        with suppress(ProcessLookupError):
            os.kill(child.process.pid, signal.SIGKILL)
    child.writer.close()
    try:
        async with asyncio.timeout(_CLOSE_SECONDS):
            await child.process.wait()
            await child.relay
    except TimeoutError:
        # Held by the kernel, a driver's fault most likely: it ends when that lets go.
        _log.error("worker does not die", pid=child.process.pid)


async def _give(child: _Child, windows: Sequence[Window]) -> None:
    """Send a batch; other tasks run between its pieces."""
    for first in range(0, len(windows), _PIECE):
        tasks = [
            Task(
                window.series.name,
                str(window.series.timeframe),
                window.values,
                window.times,
                window.last.close,
            )
            for window in windows[first : first + _PIECE]
        ]
        child.writer.write(frame(Job(tasks, first + _PIECE >= len(windows))))
        await child.writer.drain()
        await asyncio.sleep(0)


async def _take(child: _Child) -> Batch:
    """Receive a batch's results."""
    results: list[Drawn | Failed] = []
    while True:
        done: Done = await _read(child)
        results += done.results
        if done.complete:
            return Batch(results, done.seconds)


async def _read(child: _Child) -> Any:  # noqa: ANN401 - whatever the worker says
    (length,) = LENGTH.unpack(await child.reader.readexactly(LENGTH.size))
    return unframe(await child.reader.readexactly(length))


async def _relay(output: asyncio.StreamReader) -> None:
    """What the worker prints, libraries' warnings mostly, goes to the log."""
    rest = b""
    while chunk := await output.read(_LINE):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _LINE:
            lines, rest = [*lines, rest], b""
        for line in lines:
            if line.strip():
                _log.info("worker says", line=line.decode(errors="replace").rstrip())
