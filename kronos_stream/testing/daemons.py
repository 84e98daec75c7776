"""The daemon and the simulated exchange as processes, to be watched, stopped and killed.

For tests of whole systems: of this package, and of programs that read its forecasts. Linux only,
for it looks into ``/proc``. All calls block; from a coroutine use a thread.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import orjson
from prometheus_client.parser import text_string_to_metric_families

from kronos_stream.market.series import Series

_COMMAND = (sys.executable, "-m", "kronos_stream")
_PREFIX = "KRONOS_STREAM_"
_MARK = "KRONOS_TESTING_MARK"
_START_SECONDS = 90.0
_END_SECONDS = 10.0
_HTTP_SECONDS = 5.0
_POLL_SECONDS = 0.05
_MOST_KLINES = 1_000


class ProcessFailed(Exception):  # noqa: N818
    """A process did not do in time what it should; says where its log is."""


def wait_for(
    what: str, happened: Callable[[], object], seconds: float, poll: float = _POLL_SECONDS
) -> None:
    """Return once ``happened()`` is true. Raises ProcessFailed, naming ``what``, after that."""
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise ProcessFailed(f"not within {seconds:g} s: {what}")
        time.sleep(poll)


class ExchangeProcess:
    """``kronos-stream exchange``, from construction to :meth:`close`."""

    def __init__(self, *arguments: str) -> None:
        """arguments: of the command, such as ``"--symbols", "5"``. Raises ProcessFailed."""
        self._process = subprocess.Popen(  # noqa: S603
            [*_COMMAND, "exchange", "--json", "--with-parent", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None  # noqa: S101 - asked for
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise ProcessFailed("the exchange did not start; it has said why on stderr")
        facts = json.loads(line)
        self.rest_url, self.ws_url = str(facts["rest"]), str(facts["ws"])
        self.symbols: list[str] = facts["symbols"]
        """Its spot markets and perpetuals, in ccxt's notation."""
        self.timeframes: list[str] = facts["timeframes"]

    def settings(self) -> dict[str, str]:
        """Variables that make a daemon follow every market and timeframe of it."""
        return {
            "SYMBOLS": ",".join(f"binance:{symbol}" for symbol in self.symbols),
            "TIMEFRAMES": ",".join(self.timeframes),
            "BINANCE__REST_URL": self.rest_url,
            "BINANCE__WS_URL": self.ws_url,
            "BINANCE__FUTURES_REST_URL": self.rest_url,
            "BINANCE__FUTURES_WS_URL": f"{self.ws_url}/market",
        }

    def closed(self, series: Series, first: int, last: int) -> list[int]:
        """Opens, UTC ms, of the closed bars with first <= open <= last, as REST tells them."""
        futures = ":" in series.symbol
        path = "fapi/v1/klines" if futures else "api/v3/klines"
        symbol = series.symbol.partition(":")[0].replace("/", "")
        opens: list[int] = []
        while first <= last:
            rows = _get_json(
                f"{self.rest_url}/{path}?symbol={symbol}&interval={series.timeframe}"
                f"&startTime={first}&endTime={last}&limit={_MOST_KLINES}"
            )
            now = _get_json(f"{self.rest_url}/{path.rpartition('/')[0]}/time")["serverTime"]
            opens += [row[0] for row in rows if row[6] < now]
            if len(rows) < _MOST_KLINES:
                break
            first = rows[-1][0] + 1
        return opens

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.communicate(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class DaemonProcess:
    """``kronos-stream run``: started as often as one likes, killed at the end of a ``with`` block.

    What it logs is in ``folder``, a file per start, and its state, if ``settings`` do not say
    otherwise. It listens for :meth:`checks` and :meth:`metrics` on a port of its own.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        """settings: variables without ``KRONOS_STREAM_``; none is inherited."""
        self.state_file = folder / "state.sqlite"
        given = {
            "STATE_FILE": str(self.state_file),
            "HTTP__PORT": "0",
            "LOG__FORMAT": "json",
            **settings,
        }
        self._mark = uuid4().hex
        self._environ = {k: v for k, v in os.environ.items() if not k.startswith(_PREFIX)}
        self._environ |= {f"{_PREFIX}{name}": value for name, value in given.items()}
        self._environ[_MARK] = self._mark
        self._folder, self._starts = folder, 0
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._port = 0

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ProcessFailed("the daemon was not started")
        return self._process.pid

    @property
    def log_file(self) -> Path:
        """Of the latest start."""
        return self._folder / f"daemon-{self._starts}.log"

    def start(self) -> None:
        """Start it and return at once."""
        self._starts, self._port = self._starts + 1, 0
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603
                [*_COMMAND, "run"],
                env=self._environ,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        # Ends a daemon whose tests were killed: the pipe closes with this process.
        self._guard = subprocess.Popen(  # noqa: S603
            ["/bin/sh", "-c", 'read -r _; kill -9 "$0"', str(self._process.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def wait_until_ready(self, seconds: float = _START_SECONDS) -> None:
        """Until it follows its venues and delivers. Raises ProcessFailed."""
        wait_for(f"the daemon is ready ({self.log_file})", self.ready, seconds)

    def ready(self) -> bool:
        """Whether /readyz says so. Raises ProcessFailed where the daemon has ended."""
        if self._process is None or self._process.poll() is not None:
            raise ProcessFailed(f"the daemon has ended; see {self.log_file}")
        return self.checks()[0] == 200

    def checks(self) -> tuple[int, dict[str, str]]:
        """What /readyz answers: status, and what it hangs on → "ok" or why not; 0 if nothing."""
        status, body = self._get("readyz")
        return status, orjson.loads(body)["checks"] if body else {}

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """What /metrics says: (name, labels) → number; empty if it does not answer."""
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

    def log(self) -> list[dict[str, Any]]:
        """What it has logged since it was started; lines that are not JSON as their ``event``."""
        events: list[dict[str, Any]] = []
        for line in self.log_file.read_bytes().splitlines():
            try:
                events.append(orjson.loads(line))
            except orjson.JSONDecodeError:
                events.append({"event": line.decode(errors="replace")})
        return events

    def worker(self) -> int | None:
        """Its worker process, if there is one."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text("ascii").split()
        return int(children[0]) if children else None

    def resident_mib(self) -> float:
        """Memory of the daemon's own process."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text("ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        """Its exit status, once it has ended. Raises ProcessFailed."""
        assert self._process is not None  # noqa: S101 - pid says so
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise ProcessFailed(f"it did not end in {seconds:g} s; see {self.log_file}") from None
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()  # closes the pipe, too
            self._guard = None
        return status

    def stop(self, seconds: float = 30.0) -> int:
        """SIGTERM, and its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait(seconds)

    def kill(self) -> None:
        """SIGKILL: no farewell to anyone."""
        if self._process is not None:
            self._process.kill()
            self.wait(_END_SECONDS)

    def left_behind(self) -> Sequence[int]:
        """Processes that it started, at any time, or that are itself, and that still live."""
        mark = f"{_MARK}={self._mark}".encode()
        return [pid for pid in _processes() if mark in _environ(pid)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        for pid in self.left_behind():
            os.kill(pid, signal.SIGKILL)

    def _get(self, path: str) -> tuple[int, bytes]:
        if not self._port:
            told = (e["port"] for e in self.log() if e["event"] == "metrics and health are served")
            self._port = next(told, 0)
        return _get(f"http://127.0.0.1:{self._port}/{path}") if self._port else (0, b"")


def _get(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=_HTTP_SECONDS) as answer:  # noqa: S310
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def _get_json(url: str) -> Any:  # noqa: ANN401
    status, body = _get(url)
    if status != 200:
        raise ProcessFailed(f"{url} answers {status}: {body.decode(errors='replace')}")
    return orjson.loads(body)


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _environ(pid: int) -> bytes:
    """Of a living process; empty for others', and for one that has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
