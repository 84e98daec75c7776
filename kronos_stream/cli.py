"""The ``kronos-stream`` command.

Commands are imported when they run, so that ``--help`` is fast. Expected errors end as one line
each on stderr and exit code 1 or 2, never as a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Collection, Sequence
from importlib import import_module
from types import FrameType
from typing import NoReturn

import click

from kronos_stream.commands._text import printable
from kronos_stream.redaction import redact

_PROGRAM = "kronos-stream"

# Modules of kronos_stream.commands, and their summaries: so --help need not import them.
_COMMANDS = {
    "demo": "Run a live demo with simulated markets, on this machine.",
    "run": "Run the daemon: forecast live candles.",
    "replay": "Forecast recorded candles as if they were live.",
    "tail": "Show forecasts from Kafka in a live table.",
    "doctor": "Check settings, venues, sinks, model and disk.",
    "topics": "Create or check the Kafka topics.",
    "schema": "Print the JSON Schema, AsyncAPI or OpenAPI documents.",
    "exchange": "Run a simulated exchange, with faults on request.",
    "forecast": "Forecast the candles in a file.",
    "train": "Train or fine-tune a tokenizer and a predictor.",
    "evaluate": "Score a model against a random walk.",
    "bench": "Measure the speed of this machine.",
}

# Errors that the user can correct; by name, because importing them would import torch.
_USER_ERRORS = {
    "kronos_stream.daemon.inference.backend.WorkerError",
    "kronos_stream.interfaces.plugins.ConnectorError",
    "kronos_stream.daemon.storage.database.StateError",
    "kronos_stream.daemon.config.settings.SettingsError",
    "kronos_stream.engine.context.ContextError",
    "kronos_stream.interfaces.sink.SinkLoginRefused",
    "kronos_stream.market.candle_files.CandleFileError",
    "kronos_stream.interfaces.source.SourceError",
    "kronos_stream.model.checkpoint.CheckpointError",
    "kronos_stream.training.errors.TrainingError",
}

# Errors of the machine, likewise.
_MACHINE_ERRORS = {"kronos_stream.daemon.inference.backend.WorkerLost"}

_FAILED = 1
_USAGE_ERROR = 2
_INTERRUPTED = 130
_SIGNAL_EXIT_BASE = 128


class _LazyGroup(click.Group):
    """A group that imports a command from its module when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(f"kronos_stream.commands.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kronos-stream", message="%(prog)s %(version)s")
def cli() -> None:
    """Probabilistic forecasts of market candles with the Kronos model.

    For the options of a command: kronos-stream COMMAND --help.
    """


class _Stopped(BaseException):
    """SIGTERM or SIGHUP, raised as an exception so that unfinished files are removed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line (``sys.argv`` by default) and exit.

    Exit codes: 0: success. 1: a failure of the machine, such as a full disk. 2: an error that the
    user can correct. 130, 143, 129: ended by Ctrl-C, SIGTERM, SIGHUP. Errors are explained in one
    line on stderr.
    """
    _catch_signals()
    # A character that the terminal's encoding lacks must not make a command fail.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        status = cli.main(arguments, prog_name=_PROGRAM, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as help_page:
        help_page.show()
        sys.exit(help_page.exit_code)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else _PROGRAM
        _fail(f"{error.format_message()} (see {path} --help)", error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(_INTERRUPTED)
    except _Stopped as stop:
        sys.exit(_SIGNAL_EXIT_BASE + stop.number)
    except Exception as error:
        _exit_if_expected(error)
        raise
    sys.exit(status if isinstance(status, int) else 0)


def _catch_signals() -> None:
    """Raise _Stopped on SIGTERM and SIGHUP. SIGINT stays as Python and the shell have set it."""
    if threading.current_thread() is not threading.main_thread():
        return
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # A signal that is ignored is so on purpose, by nohup for example.
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _raise_stopped)


def _raise_stopped(number: int, _: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
    raise _Stopped(number)


def _discard_stdout() -> None:
    """Redirect stdout to nowhere, or flushing its buffer at exit would fail again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # replaced by an object without a descriptor
        return


def _exit_if_expected(error: Exception) -> None:
    """Exit with a line on stderr if the error is expected; else return."""
    if isinstance(error, OSError):
        _discard_stdout()
        if isinstance(error, BrokenPipeError):  # the reader of a pipe has closed it
            sys.exit(_FAILED)
        _fail(f"{error.filename or 'writing'}: {error.strerror or error}", _FAILED)
    # torch raises RuntimeError when memory runs out.
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "allocate" in str(error)
    ):
        _fail(f"not enough memory: {str(error)[:200]}", _FAILED)
    if _is_any_of(error, _MACHINE_ERRORS):
        _fail(str(error), _FAILED)
    if _is_any_of(error, _USER_ERRORS):
        *others, last = getattr(error, "problems", [str(error)])
        for problem in others:
            _print_error(problem)
        _fail(last, _USAGE_ERROR)


def _fail(message: str, status: int) -> NoReturn:
    _print_error(message)
    sys.exit(status)


def _print_error(message: str) -> None:
    print(f"{_PROGRAM}: error: {printable(redact(message))}", file=sys.stderr)  # noqa: T201


def _is_any_of(error: Exception, names: Collection[str]) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" in names for kind in type(error).__mro__)


if __name__ == "__main__":
    main()
