"""The daemon as a process, to be watched, stopped and killed.

For tests of whole systems: of this package, and of programs that read its forecasts. Linux only,
for it looks into ``/proc``. All calls block; from a coroutine use a thread.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import orjson
from prometheus_client.parser import text_string_to_metric_families

from kronos_stream.daemon.requests import Outcome
from kronos_stream.daemon.storage.state import State
from kronos_stream.market.series import Series
from tests.support.managed_process import Closeable, ManagedProcess
from tests.support.processes import COMMAND, ProcessFailed, http_get, wait_for

_PREFIX = "KRONOS_STREAM_"
_PROCESS_TAG = "KRONOS_TESTING_MARK"
_START_TIMEOUT = 90.0


MetricSamples = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""What a daemon measures: name and labels → number."""


class DaemonProcess(Closeable):
    """``kronos-stream run``: started as often as one likes, killed at the end of a ``with`` block.

    What it logs is in ``folder``, a file per start, and its state, if ``settings`` do not say
    otherwise. It listens for :meth:`checks` and :meth:`metrics` on a port of its own.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, str],
        command: Sequence[str] = (*COMMAND, "run"),
    ) -> None:
        """settings: variables without ``KRONOS_STREAM_``; none is inherited."""
        self._command = command
        self.state_file = folder / "state.sqlite"
        given = {
            "STATE_FILE": str(self.state_file),
            "HTTP__PORT": "0",
            "LOG__FORMAT": "json",
            **settings,
        }
        self._process_tag = uuid4().hex
        self._environ = {k: v for k, v in os.environ.items() if not k.startswith(_PREFIX)}
        self._environ |= {f"{_PREFIX}{name}": value for name, value in given.items()}
        self._environ[_PROCESS_TAG] = self._process_tag
        self._folder, self._start_count = folder, 0
        self._process: ManagedProcess | None = None
        self._port = 0

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ProcessFailed("the daemon was not started")
        return self._process.pid

    @property
    def log_file(self) -> Path:
        """Of the latest start."""
        return self._folder / f"daemon-{self._start_count}.log"

    def start(self) -> None:
        """Start it and return at once."""
        self._start_count, self._port = self._start_count + 1, 0
        self.log_file.unlink(missing_ok=True)
        self._process = ManagedProcess(
            self._command, self.log_file, environ=self._environ, folder=self._folder
        )

    def wait_until_ready(self, seconds: float = _START_TIMEOUT) -> None:
        """Until it follows its venues and delivers. Raises ProcessFailed."""
        wait_for(f"the daemon is ready ({self.log_file})", self.is_ready, seconds)

    def is_ready(self) -> bool:
        """Whether /readyz says so. Raises ProcessFailed where the daemon has ended."""
        if self._process is None or not self._process.alive:
            raise ProcessFailed(f"the daemon has ended; see {self.log_file}")
        return self.readiness()[0] == 200

    def readiness(self) -> tuple[int, dict[str, str]]:
        """What /readyz answers: status, and what it hangs on → "ok" or why not; 0 if nothing."""
        status, body = self._get("readyz")
        return status, orjson.loads(body)["checks"] if body else {}

    def metrics(self) -> MetricSamples:
        """What /metrics says; empty if it does not answer."""
        families = text_string_to_metric_families(self._get("metrics")[1].decode())
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels; 0 if there are none."""
        wanted = labels.items()
        found = self.metrics().items()
        return sum(value for (one, has), value in found if one == name and wanted <= has)

    def series_status(self) -> list[dict[str, Any]]:
        """What /series says of each; empty if it does not answer."""
        status, body = self._get("series")
        return orjson.loads(body)["series"] if status == 200 else []

    def log_records(self) -> list[dict[str, Any]]:
        """What it has logged since it was started; lines that are not JSON as their ``event``."""
        events: list[dict[str, Any]] = []
        for line in self.log_file.read_bytes().splitlines():
            try:
                events.append(orjson.loads(line))
            except orjson.JSONDecodeError:
                events.append({"event": line.decode(errors="replace")})
        return events

    def worker_pid(self) -> int | None:
        """Its worker process, if there is one."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text("ascii").split()
        return int(children[0]) if children else None

    def resident_mib(self) -> float:
        """Memory of the daemon's own process."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text("ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def open_files(self) -> Sequence[str]:
        """What its own process has open: paths, and such as ``socket:[4711]``."""
        found = []
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                found.append(str(link.readlink()))
        return found

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        """Its exit status, once it has ended. Raises ProcessFailed."""
        assert self._process is not None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise ProcessFailed(f"it did not end in {seconds:g} s; see {self.log_file}") from None

    def stop(self, seconds: float = 30.0) -> int:
        """SIGTERM, and its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait(seconds)

    def kill(self) -> None:
        """SIGKILL: no farewell to anyone."""
        if self._process is not None:
            self._process.wait_or_kill()

    def outcome_range(self, series: Sequence[Series]) -> dict[Series, tuple[int, int]]:
        """By series: opens of the first bar that was due, and of the newest that has an outcome.

        Only while the daemon does not run; series that it never came to follow are left out.
        """
        return asyncio.run(_outcome_range(self.state_file, series))

    def outcomes(self, series: Sequence[Series]) -> dict[Series, list[Outcome]]:
        """What became of each one's due bars, in order. Only while the daemon does not run."""
        return asyncio.run(_outcomes(self.state_file, series))

    def undelivered(self) -> int:
        """Records that wait in the state file. Only while the daemon does not run."""
        return asyncio.run(_undelivered(self.state_file))

    def leftover_processes(self) -> Sequence[int]:
        """Processes that it started, at any time, or that are itself, and that still live."""
        mark = f"{_PROCESS_TAG}={self._process_tag}".encode()
        return [pid for pid in _processes() if mark in _process_environment(pid)]

    def close(self) -> None:
        """End it, and all that it started."""
        self.kill()
        for pid in self.leftover_processes():
            os.kill(pid, signal.SIGKILL)

    def _get(self, path: str) -> tuple[int, bytes]:
        if not self._port:
            told = (
                e["port"]
                for e in self.log_records()
                if e["event"] == "metrics and health are served"
            )
            self._port = next(told, 0)
        return http_get(f"http://127.0.0.1:{self._port}/{path}") if self._port else (0, b"")


async def _outcome_range(path: Path, names: Sequence[Series]) -> dict[Series, tuple[int, int]]:
    state = await State.open(path)
    try:
        found = {}
        for series in names:
            mark = await state.watermark(series)
            if mark is not None:
                outcomes = await state.outcomes(series, 0)
                first = outcomes[0].origin if outcomes else series.timeframe.after(mark[0])
                found[series] = (first, mark[0])
        return found
    finally:
        await state.close()


async def _outcomes(path: Path, names: Sequence[Series]) -> dict[Series, list[Outcome]]:
    state = await State.open(path)
    try:
        return {series: await state.outcomes(series, 0) for series in names}
    finally:
        await state.close()


async def _undelivered(path: Path) -> int:
    state = await State.open(path)
    try:
        return sum(backlog.records for backlog in (await state.backlogs()).values())
    finally:
        await state.close()


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _process_environment(pid: int) -> bytes:
    """Of a living process; empty for others', and for one that has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
