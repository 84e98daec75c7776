"""The ``kronos-stream`` command.

Sub-commands are imported when they run, so that ``--help`` answers at once; and errors meant for
the user leave as a line each on stderr and exit code 2, never as a traceback.
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

_PROGRAM = "kronos-stream"

# Name: (module, what it does). The line stands here so that the overview imports no command.
_COMMANDS = {
    "demo": ("kronos_stream.commands.demo", "Show forecasts flowing, all on this machine."),
    "run": ("kronos_stream.commands.run", "Forecast live candles; the daemon."),
    "replay": ("kronos_stream.commands.replay", "Forecast recorded candles, bar by bar."),
    "tail": ("kronos_stream.commands.tail", "Show forecasts from Kafka as a live table."),
    "doctor": ("kronos_stream.commands.doctor", "Look over settings, venues, sinks, model, disk."),
    "topics": ("kronos_stream.commands.topics", "Create or check the Kafka topics."),
    "schema": ("kronos_stream.commands.schema", "Print the messages' JSON Schema or AsyncAPI."),
    "exchange": ("kronos_stream.commands.exchange", "Run a simulated exchange, with faults."),
    "forecast": ("kronos_stream.commands.forecast", "Forecast the candles in a file."),
    "train": ("kronos_stream.commands.train", "Train or fine-tune a tokenizer and a predictor."),
    "evaluate": ("kronos_stream.commands.evaluate", "Score a model against a random walk."),
    "bench": ("kronos_stream.commands.bench", "Measure speed on this machine, against its limits."),
}

# By name, since importing them would import torch.
_USER_ERRORS = {
    "kronos_stream.daemon.inference.process.WorkerError",
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

# Likewise, of what the machine did.
_MACHINE_ERRORS = {"kronos_stream.daemon.inference.supervisor.WorkerLost"}

_FAILED = 1
_USAGE_ERROR = 2
_INTERRUPTED = 130
_SIGNAL_EXIT_BASE = 128


class _LazyGroup(click.Group):
    """A group whose commands are attributes, of their own name, of modules not yet imported."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(_COMMANDS[cmd_name][0]), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kronos-stream", message="%(prog)s %(version)s")
def cli() -> None:
    """Probabilistic forecasts of market candles with the Kronos model.

    Each command explains itself: kronos-stream COMMAND --help.
    """


class _Stopped(BaseException):
    """SIGTERM or SIGHUP, as an exception so that unfinished files are removed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line (``sys.argv`` by default) and exit.

    0: done. 1: the machine failed, such as a full disk. 2: the user can mend it. For both, one line
    on stderr says what and how. 130: interrupted by Ctrl-C; 143 and 129: by SIGTERM and SIGHUP.
    """
    _catch_signals()
    # A name that the terminal's encoding lacks is no reason to lose a forecast.
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
    if threading.current_thread() is not threading.main_thread():
        return
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # Ignored means on purpose, by nohup for one.
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _raise_stopped)


def _raise_stopped(number: int, _: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)  # a second one ends us at once
    raise _Stopped(number)


def _discard_stdout() -> None:
    """Point stdout nowhere: what it still holds would fail again when Python ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a stand-in without a descriptor
        return


def _exit_if_expected(error: Exception) -> None:
    """Exit with a line on stderr for what is no fault of the program; else return."""
    if isinstance(error, OSError):
        _discard_stdout()
        if isinstance(error, BrokenPipeError):  # the reader has seen enough
            sys.exit(_FAILED)
        _fail(f"{error.filename or 'writing'}: {error.strerror or error}", _FAILED)
    # torch says it by a RuntimeError.
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
    # A name from outside may hold what a terminal would take for a command.
    from kronos_stream.daemon.telemetry.logs import redact

    line = redact(" ".join(message.split()))
    line = "".join(c if c.isprintable() else "?" for c in line)
    print(f"{_PROGRAM}: error: {line}", file=sys.stderr)  # noqa: T201


def _is_any_of(error: Exception, names: Collection[str]) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" in names for kind in type(error).__mro__)


if __name__ == "__main__":
    main()
