"""The daemon as a process that tests observe, stop and kill.

Linux only, because it reads ``/proc``. All calls block; from a coroutine use a thread.
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
from tests.support.processes import (
    COMMAND,
    WAIT_SECONDS,
    ProcessFailed,
    http_get,
    resident_mib,
    wait_for,
)

_PREFIX = "KRONOS_STREAM_"
_PROCESS_TAG = "KRONOS_TESTING_MARK"

MetricSamples = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""Values of metrics by name and labels."""


def p99(histogram: str, before: MetricSamples, after: MetricSamples) -> float:
    """99th percentile of a histogram's observations between two samples: a bucket's upper bound."""
    counts = {
        float(dict(labels)["le"]): value - before.get((name, labels), 0.0)
        for (name, labels), value in after.items()
        if name == f"{histogram}_bucket"
    }
    return min(bound for bound, count in counts.items() if count >= 0.99 * max(counts.values()))


class DaemonProcess(Closeable):
    """``kronos-stream run``, which may be started repeatedly; a ``with`` block kills it at its end.

    ``folder`` holds its logs, a file per start, and its state file unless ``settings`` name
    another. Its status pages have a port of their own.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, str],
        command: Sequence[str] = (*COMMAND, "run"),
    ) -> None:
        """settings: variables without ``KRONOS_STREAM_``; it inherits no others."""
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
        """Log of the latest start."""
        return self._folder / f"daemon-{self._start_count}.log"

    def start(self) -> None:
        """Start it and return at once."""
        self._start_count, self._port = self._start_count + 1, 0
        self.log_file.unlink(missing_ok=True)
        self._process = ManagedProcess(
            self._command, self.log_file, environ=self._environ, folder=self._folder
        )

    def wait_until_ready(self) -> None:
        """Wait until it receives bars and delivers forecasts. Raises ProcessFailed."""
        wait_for(f"the daemon is ready ({self.log_file})", self.is_ready)

    def is_ready(self) -> bool:
        """Return whether it is ready, by /readyz. Raises ProcessFailed if it has ended."""
        if self._process is None or not self._process.alive:
            raise ProcessFailed(f"the daemon has ended; see {self.log_file}")
        return self.readiness()[0] == 200

    def readiness(self) -> tuple[int, dict[str, str]]:
        """Status of /readyz, 0 if it is not served, and results of checks: "ok" or an error."""
        status, body = self._get("readyz")
        return status, orjson.loads(body)["checks"] if body else {}

    def metrics(self) -> MetricSamples:
        """Samples of /metrics; empty if it is not served."""
        families = text_string_to_metric_families(self._get("metrics")[1].decode())
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples with these labels; 0 if there are none."""
        wanted = labels.items()
        found = self.metrics().items()
        return sum(
            value for (found_name, has), value in found if found_name == name and wanted <= has
        )

    def series_status(self) -> list[dict[str, Any]]:
        """Series of /series; empty if it is not served."""
        status, body = self._get("series")
        return orjson.loads(body)["series"] if status == 200 else []

    def log_records(self) -> list[dict[str, Any]]:
        """Its log since the latest start; a line that is not JSON becomes an ``event``."""
        events: list[dict[str, Any]] = []
        for line in self.log_file.read_bytes().splitlines():
            try:
                events.append(orjson.loads(line))
            except orjson.JSONDecodeError:
                events.append({"event": line.decode(errors="replace")})
        return events

    def worker_pid(self) -> int | None:
        """Process id of its worker, if it has one."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text("ascii").split()
        return int(children[0]) if children else None

    def resident_mib(self) -> float:
        """Resident memory of the daemon's own process, without its worker."""
        return resident_mib(self.pid)

    def open_files(self) -> Sequence[str]:
        """Files that its own process has open: paths, and entries such as ``socket:[4711]``."""
        found = []
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                found.append(str(link.readlink()))
        return found

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for its end, and return its exit status. Raises ProcessFailed."""
        assert self._process is not None
        try:
            return self._process.wait()
        except subprocess.TimeoutExpired:
            raise ProcessFailed(
                f"it did not end within {WAIT_SECONDS:g} s; see {self.log_file}"
            ) from None

    def stop(self) -> int:
        """End it with SIGTERM, and return its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End it with SIGKILL."""
        if self._process is not None:
            self._process.kill()

    def outcome_range(self, series: Sequence[Series]) -> dict[Series, tuple[int, int]]:
        """Open times of the first bar that was due and of the newest with an outcome, by series.

        Only while the daemon does not run; series that it has no state of are left out.
        """
        return asyncio.run(_outcome_range(self.state_file, series))

    def outcomes(self, series: Sequence[Series]) -> dict[Series, list[Outcome]]:
        """Outcomes of each series, in order. Only while the daemon does not run."""
        return asyncio.run(_outcomes(self.state_file, series))

    def undelivered(self) -> int:
        """Number of undelivered records in the state file. Only while the daemon does not run."""
        return asyncio.run(_undelivered(self.state_file))

    def leftover_processes(self) -> Sequence[int]:
        """Ids of running processes among itself and all that it ever started."""
        tag = f"{_PROCESS_TAG}={self._process_tag}".encode()
        return [pid for pid in _process_ids() if tag in _process_environment(pid)]

    def close(self) -> None:
        """End it and all processes that it started, with SIGKILL."""
        self.kill()
        for pid in self.leftover_processes():
            os.kill(pid, signal.SIGKILL)

    def _get(self, path: str) -> tuple[int, bytes]:
        if not self._port:
            self._port = next(
                (
                    record["port"]
                    for record in self.log_records()
                    if record["event"] == "HTTP server started"
                ),
                0,
            )
        return http_get(f"http://127.0.0.1:{self._port}/{path}") if self._port else (0, b"")


async def _outcome_range(path: Path, names: Sequence[Series]) -> dict[Series, tuple[int, int]]:
    state = await State.open(path)
    try:
        found = {}
        for series in names:
            watermark = await state.watermark(series)
            if watermark is not None:
                outcomes = await state.outcomes(series, 0)
                first = outcomes[0].origin if outcomes else series.timeframe.after(watermark[0])
                found[series] = (first, watermark[0])
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


def _process_ids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _process_environment(pid: int) -> bytes:
    """Environment of a running process; empty if it has ended or belongs to another user."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
