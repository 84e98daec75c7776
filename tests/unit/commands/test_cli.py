"""The command line: fast help, exit codes and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command_line import CommandLine, assert_usage_error, write_candles
from tests.support.processes import WAIT_SECONDS, wait_for

_COMMAND = [sys.executable, "-m", "kronos_stream"]


@pytest.fixture
def model(parity_folder: Path) -> str:
    """Folder of the tiny checkpoint, trained on a window of 128 bars."""
    return str(parity_folder / "tiny")


@pytest.fixture
def candles(tmp_path: Path) -> Path:
    path = tmp_path / "coin.csv"
    write_candles(path)
    return path


def test_help_imports_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "from kronos_stream.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'pandas', 'matplotlib', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    for arguments in (["--help"], ["forecast", "--help"], ["--version"]):
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "kronos-stream" in done.stdout


def test_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str], model: str) -> None:
    command = CommandLine(capsys, model)
    assert_usage_error(command.run("forcast"), "No such command 'forcast'")
    without_arguments = command.run()
    assert without_arguments.status == 2
    assert "Usage: kronos-stream" in without_arguments.err


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full")
def test_full_disk_under_stdout_is_one_line(candles: Path, model: str) -> None:
    options = ["--model", model, "--max-context", "128", "--horizon", "2"]
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(  # noqa: S603
            [*_COMMAND, "forecast", str(candles), *options],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="no signals to another process there")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_leaves_no_file_and_no_traceback(
    candles: Path, model: str, tmp_path: Path, name: str
) -> None:
    number = getattr(signal, name)
    out = tmp_path / "paths.parquet"
    out.write_text("the old one")
    options = ["--model", model, "--max-context", "128", "--paths", "1000000", "--out", str(out)]
    # A child inherits that a signal is ignored, as under nohup; a handler becomes the default.
    inherited = signal.signal(number, signal.default_int_handler)
    try:
        process = subprocess.Popen(  # noqa: S603
            [*_COMMAND, "forecast", str(candles), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(number, inherited)
    try:
        wait_for(
            "the first paths are written, or the command has failed",
            lambda: list(tmp_path.glob(".paths.parquet.*")) or process.poll() is not None,
        )
        assert process.poll() is None, process.communicate()
        process.send_signal(number)
        printed, errors = process.communicate(timeout=WAIT_SECONDS)
    finally:
        process.kill()  # it would sample a million paths
    assert process.returncode == 128 + number, errors
    assert printed == ""
    assert "Traceback" not in errors
    assert out.read_text() == "the old one"
    assert list(tmp_path.glob(".*")) == []
