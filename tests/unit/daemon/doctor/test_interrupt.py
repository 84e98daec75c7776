"""Ctrl-C while checks run."""

from __future__ import annotations

import signal
import subprocess
import sys

_CODE = """
import asyncio, signal, sys, time
from kronos_stream.daemon.doctor.doctor import run_until_interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)

async def main():
    blocked = asyncio.get_running_loop().run_in_executor(None, time.sleep, 3600)
    try:
        print("started", flush=True)
        await blocked
    finally:
        print("cleaned up")

run_until_interrupted(main())
"""


def test_ctrl_c_does_not_wait_for_blocked_threads() -> None:
    """Such as one with a DNS lookup."""
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", _CODE], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=300)
        finally:
            process.kill()
    assert (process.returncode, output) == (130, "cleaned up\n")
