"""Prometheus as a process: to scrape what is served here, and to be asked what it saw.

Needs its programs, prometheus and promtool (Debian and Ubuntu: package ``prometheus``). All calls
block; from a coroutine use a thread.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from signal import Signals
from typing import Any, Self
from urllib.parse import urlencode

from tests.support.managed_process import Closeable, ManagedProcess
from tests.support.processes import http_get

_START_TIMEOUT = 30.0
_STOP_TIMEOUT = 10.0


class PrometheusFailed(Exception):  # noqa: N818
    """It is not installed, did not come up, or does not take what it is given; says why."""


class Prometheus(Closeable):
    """One with a configuration of its own, running in a ``with`` block.

    folder: where it keeps what it measures, and its log; relative paths in the configuration are
    from there.
    """

    def __init__(self, folder: Path, configuration: str) -> None:
        """configuration: what stands in ``prometheus.yaml``. Raises PrometheusFailed."""
        self._program = find_program("prometheus")
        self.log_file = folder / "prometheus.log"
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "prometheus.yaml"
        self._file.write_text(configuration, "utf-8")
        self._process: ManagedProcess | None = None
        self._url = ""

    def start(self) -> None:
        """Start it, and wait until it answers. Raises PrometheusFailed."""
        command = [
            self._program,
            f"--config.file={self._file}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            "--web.listen-address=127.0.0.1:0",
            "--log.format=json",
        ]
        self.log_file.unlink(missing_ok=True)
        self._process = ManagedProcess(command, self.log_file)
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._is_ready():
            if not self._process.alive or time.monotonic() > deadline:
                self.close()
                raise PrometheusFailed(f"prometheus did not come up; see {self.log_file}")
            time.sleep(0.05)

    def close(self) -> None:
        """End it; its folder remains."""
        if self._process is not None:
            self._process.signal(Signals.SIGTERM)
            self._process.wait_or_kill(_STOP_TIMEOUT)
        self._process = None

    def api_get(self, path: str, parameters: Mapping[str, str] | None = None) -> Any:
        """The data of an answer of its HTTP API: ``ask("query", {"query": "up"})``.

        Raises PrometheusFailed with its word where it refuses.
        """
        status, body = http_get(f"{self._url}/api/v1/{path}?{urlencode(parameters or {})}")
        answer = json.loads(body) if body else {"status": "no answer"}
        if answer["status"] != "success":
            raise PrometheusFailed(f"{path}: {status} {answer.get('error', body.decode())}")
        return answer["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """What an expression gives now: labels and number of each. Raises PrometheusFailed."""
        data = self.api_get("query", {"query": expression})
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(one["metric"], float(one["value"][1])) for one in data["result"]]

    def __enter__(self) -> Self:
        self.start()
        return self

    def _is_ready(self) -> bool:
        if not self._url:
            # It takes a port that is free, and says which.
            for line in self.log_file.read_text("utf-8", "replace").splitlines():
                said = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
                if str(said.get("msg", "")).lower() == "listening on":
                    self._url = f"http://{said['address']}"
        return bool(self._url) and http_get(f"{self._url}/-/ready")[0] == 200


def find_program(name: str) -> str:
    """Where prometheus or promtool is installed. Raises PrometheusFailed."""
    if (found := shutil.which(name)) is None:
        raise PrometheusFailed(f"no {name} on PATH; Debian and Ubuntu have it in: prometheus")
    return found
