"""Tools for tests with processes: signals, waiting, programs, HTTP requests.

All calls block; from a coroutine use a thread.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson

# -P: modules in the current directory must not shadow others.
COMMAND = (sys.executable, "-P", "-m", "kronos_stream")

WAIT_SECONDS = 300.0
"""Bound of every wait: only something that never happens takes so long, on any machine."""

_POLL_SECONDS = 0.05
_HTTP_SECONDS = 60.0


class ProcessFailed(Exception):  # noqa: N818
    """A process is missing, failed, or did not do something in time; names its log."""


def restore_default_signals() -> None:
    """Let children of this process react to Ctrl-C, also if it was started in the background.

    A shell starts background jobs with SIGINT and SIGQUIT ignored, and children inherit that.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGQUIT) == signal.SIG_IGN:
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})


def wait_for(
    description: str,
    condition: Callable[[], object],
    timeout: float = WAIT_SECONDS,
    *,
    interval: float = _POLL_SECONDS,
) -> None:
    """Return once ``condition()`` is true. Raises ProcessFailed with ``description``."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise ProcessFailed(f"not within {timeout:g} s: {description}")
        time.sleep(interval)


def find_program(name: str, package: str, *, more_folders: str = "") -> str:
    """Path of an installed program. Raises ProcessFailed.

    package: the package of Debian and Ubuntu that has it. more_folders: searched after PATH.
    """
    found = shutil.which(name) or (more_folders and shutil.which(name, path=more_folders))
    if not found:
        raise ProcessFailed(f"no {name} on PATH; Debian and Ubuntu have it in package {package}")
    return found


def settings_environment(settings: Mapping[str, object]) -> dict[str, str]:
    """Our environment with these settings of the daemon, and no others.

    settings: by name without ``KRONOS_STREAM_``.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("KRONOS_STREAM_")}
    return inherited | {f"KRONOS_STREAM_{name}": str(value) for name, value in settings.items()}


def http_get(url: str) -> tuple[int, bytes]:
    """Status and body of the response; status 0 if there is none."""
    try:
        with urllib.request.urlopen(url, timeout=_HTTP_SECONDS) as response:  # noqa: S310
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def http_get_json(url: str) -> Any:
    """Body of the response. Raises ProcessFailed unless the status is 200."""
    status, body = http_get(url)
    if status != 200:
        raise ProcessFailed(f"{url} answers {status}: {body.decode(errors='replace')}")
    return orjson.loads(body)


def resident_mib(pid: int | str = "self") -> float:
    """Resident memory of a process, from /proc."""
    pages = int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
