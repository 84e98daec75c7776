"""The command line run in this process, and a file of candles for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

from kronos_stream.cli import main

START_MS = 1_718_709_300_000
"""Open of the first bar of :func:`write_candles`: 2024-06-18T11:15:00Z."""
STEP_MS = 300_000


class CommandResult(NamedTuple):
    """Exit status and output of a command."""

    status: int
    out: str
    err: str


class CommandLine:
    """Runs commands in this process, where torch is loaded already.

    ``forecast`` uses ``model``, a checkpoint with a window of 128 bars.
    """

    def __init__(self, capsys: pytest.CaptureFixture[str], model: str) -> None:
        self._capsys, self.model = capsys, model

    def run(self, *arguments: object) -> CommandResult:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        out, err = self._capsys.readouterr()
        assert isinstance(exited.value.code, int)
        return CommandResult(exited.value.code, out, err)

    def forecast(self, file: Path, *options: object) -> CommandResult:
        exact = ("--model", self.model, "--max-context", 128, "--dtype", "float32")
        return self.run("forecast", file, *exact, "--device", "cpu", *options)


def assert_usage_error(result: CommandResult, message: str) -> None:
    """Check that a command failed with one line on stderr, which matches ``message``."""
    lines = [line for line in result.err.splitlines() if not line.startswith("note: ")]
    assert (result.status, result.out, len(lines)) == (2, "", 1), result.err
    assert re.search(rf"^kronos-stream: error: .*{message}", lines[0]), result.err


def write_candles(path: Path) -> None:
    """Write a CSV of 90 five-minute bars."""
    rng = np.random.default_rng(7)
    close = 100 * np.exp(rng.normal(0, 0.004, 90).cumsum())
    opened = np.r_[100.0, close[:-1]]
    frame = pd.DataFrame(
        {
            "time": pd.to_datetime(START_MS + STEP_MS * np.arange(90), unit="ms", utc=True),
            "open": opened,
            "high": np.maximum(opened, close) * 1.001,
            "low": np.minimum(opened, close) * 0.999,
            "close": close,
            "volume": rng.uniform(1, 10, 90),
        }
    )
    frame.to_csv(path, index=False)
