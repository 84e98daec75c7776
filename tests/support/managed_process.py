"""Processes that tests start, and that end with them."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from signal import Signals
from types import TracebackType
from typing import Self


class Closeable:
    """Something that a ``with`` block ends; whoever starts with it, too, has its own beginning."""

    def close(self) -> None:
        """End it."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ManagedProcess:
    """A process from construction on; killed at the latest when ours ends, in whatever way.

    It has a session of its own: Ctrl-C is for the tests, which then end what they started.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        *,
        environ: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        """log: the file that what it says is added to. environ, folder: else ours."""
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

    def wait(self, seconds: float) -> int:
        """Its exit status, once it has ended. Raises subprocess.TimeoutExpired."""
        status = self._process.wait(seconds)
        self._reaper.kill()
        self._reaper.communicate()  # closes the pipe, too
        return status

    def wait_or_kill(self, timeout: float = 0.0) -> None:
        """Return once it has ended: by itself within so many seconds, or by SIGKILL."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.wait(60.0)
