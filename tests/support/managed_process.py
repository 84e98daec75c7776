"""Processes that tests start, and that end with the test run."""

from __future__ import annotations

import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from signal import Signals
from typing import Self

from tests.support.processes import WAIT_SECONDS, ProcessFailed, wait_for

_STOP_SECONDS = 30.0
"""A server that has not stopped by then is killed."""


class Closeable(ABC):
    """An object that a ``with`` block closes at its end."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ManagedProcess:
    """A running process, killed at the latest when the test run ends, even abnormally.

    It has its own session, so Ctrl-C at the terminal reaches only the test run.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        *,
        environ: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        """log: file to which its output is appended. environ, folder: default to ours."""
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                env=environ,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # The pipe closes with this process, even if it is killed.
        self._reaper = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _; kill -9 "$0"', str(self.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: Signals) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float = WAIT_SECONDS) -> int:
        """Wait for the end, and return the exit status. Raises subprocess.TimeoutExpired."""
        status = self._process.wait(seconds)
        self._reaper.kill()
        self._reaper.communicate()  # closes the pipe, too
        return status

    def kill(self) -> None:
        """End it with SIGKILL, if it still runs."""
        self._process.kill()
        self.wait()

    def wait_or_kill(self, seconds: float) -> None:
        """Wait for the end, and end it by SIGKILL after so many seconds."""
        try:
            self.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()


class ServerProcess(Closeable):
    """Base of servers that tests start, stop, kill and freeze, as often as they like.

    Runs from :meth:`start` to :meth:`close`, or in a ``with`` block.
    """

    def __init__(self, log_file: Path) -> None:
        self.log_file = log_file
        self._process: ManagedProcess | None = None

    @abstractmethod
    def _command(self) -> Sequence[str | Path]: ...

    @abstractmethod
    def _is_ready(self) -> bool:
        """Return whether it serves clients."""

    def start(self) -> None:
        """Start it, and wait until it serves clients. Raises ProcessFailed."""
        with ExitStack() as undo:
            undo.callback(self.kill)
            self.launch()
            self.wait_until_ready()
            undo.pop_all()

    def launch(self) -> None:
        """Start it, and return at once."""
        self._process = ManagedProcess(self._command(), self.log_file)

    def wait_until_ready(self) -> None:
        """Wait until it serves clients. Raises ProcessFailed."""

        def ready() -> bool:
            if not self.running:
                raise ProcessFailed(f"a server did not start; see {self.log_file}")
            return self._is_ready()

        wait_for(f"a server is ready; see {self.log_file}", ready)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.alive

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ProcessFailed("the server was not started")
        return self._process.pid

    def terminate(self) -> None:
        """Send SIGTERM, and return at once."""
        self._signal(Signals.SIGTERM)

    def stop(self) -> None:
        """End it with SIGTERM, so that it saves its state; with SIGKILL if that takes too long."""
        self.terminate()
        if self._process is not None:
            self._process.wait_or_kill(_STOP_SECONDS)
        self._process = None

    def kill(self) -> None:
        """End it with SIGKILL."""
        if self._process is not None:
            self._process.kill()
        self._process = None

    def freeze(self) -> None:
        """Suspend it: connections stay open, but it answers nothing."""
        self._signal(Signals.SIGSTOP)

    def thaw(self) -> None:
        """Continue after :meth:`freeze`."""
        self._signal(Signals.SIGCONT)

    def close(self) -> None:
        """End it with SIGKILL; its files remain."""
        self.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def _signal(self, number: Signals) -> None:
        if self._process is not None:
            self._process.signal(number)
