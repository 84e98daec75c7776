"""Prometheus as a process: scrapes what tests serve, and answers queries.

Needs the programs prometheus and promtool (Debian and Ubuntu: package ``prometheus``). All calls
block; from a coroutine use a thread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.support.managed_process import ServerProcess
from tests.support.processes import ProcessFailed, find_program, http_get


class Prometheus(ServerProcess):
    """A Prometheus server with its own configuration.

    folder: for its data and its log; relative paths in the configuration start there.
    """

    def __init__(self, folder: Path, configuration: str) -> None:
        """configuration: content of ``prometheus.yaml``. Raises ProcessFailed."""
        super().__init__(folder / "prometheus.log")
        self._program = prometheus_program("prometheus")
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "prometheus.yaml"
        self._file.write_text(configuration, "utf-8")
        self._url = ""

    def launch(self) -> None:
        self.log_file.unlink(missing_ok=True)
        self._url = ""
        super().launch()

    def _command(self) -> Sequence[str]:
        return [
            self._program,
            f"--config.file={self._file}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            "--web.listen-address=127.0.0.1:0",
            "--log.format=json",
        ]

    def api_get(self, path: str, parameters: Mapping[str, str] | None = None) -> Any:
        """Data of an answer of its HTTP API: ``api_get("query", {"query": "up"})``.

        Raises ProcessFailed with its error message.
        """
        status, body = http_get(f"{self._url}/api/v1/{path}?{urlencode(parameters or {})}")
        answer = json.loads(body) if body else {"status": "no answer"}
        if answer["status"] != "success":
            raise ProcessFailed(f"{path}: {status} {answer.get('error', body.decode())}")
        return answer["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Present values of an expression, with their labels. Raises ProcessFailed."""
        data = self.api_get("query", {"query": expression})
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(item["metric"], float(item["value"][1])) for item in data["result"]]

    def _is_ready(self) -> bool:
        if not self._url:
            # It chooses a free port and logs it.
            for line in self.log_file.read_text("utf-8", "replace").splitlines():
                entry = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
                if str(entry.get("msg", "")).lower() == "listening on":
                    self._url = f"http://{entry['address']}"
        return bool(self._url) and http_get(f"{self._url}/-/ready")[0] == 200


def prometheus_program(name: str) -> str:
    """Path of prometheus or promtool. Raises ProcessFailed."""
    return find_program(name, "prometheus")
