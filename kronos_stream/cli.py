"""The ``kronos-stream`` command.

Sub-commands are imported when they run, so that ``--help`` answers at once; and errors meant for
the user leave as one line on stderr and exit code 2, never as a traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import click

_PROGRAM = "kronos-stream"

# Name: (module, what it does). The line stands here so that the overview imports no command.
_COMMANDS = {
    "forecast": ("kronos_stream.commands.forecast", "Forecast the candles in a file."),
    "train": ("kronos_stream.commands.train", "Train or fine-tune a tokenizer and a predictor."),
    "evaluate": ("kronos_stream.commands.evaluate", "Score a model against a random walk."),
    "bench": ("kronos_stream.commands.bench", "Measure speed on this machine, against its limits."),
}

# By name, since importing them would import torch.
_USER_ERRORS = {
    "kronos_stream.engine.context.ContextError",
    "kronos_stream.market.files.CandleFileError",
    "kronos_stream.model.checkpoint.CheckpointError",
    "kronos_stream.training.errors.TrainingError",
}

_USAGE_ERROR = 2
_INTERRUPTED = 130


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


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line (``sys.argv`` by default) and exit.

    0: done. 2: the user can mend it, one line on stderr says how. 130: interrupted by Ctrl-C.
    """
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
    except Exception as error:
        if not _is_for_user(error):
            raise
        _fail(str(error), _USAGE_ERROR)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> NoReturn:
    line = " ".join(message.split())
    print(f"{_PROGRAM}: error: {line}", file=sys.stderr)  # noqa: T201
    sys.exit(status)


def _is_for_user(error: Exception) -> bool:
    return any(
        f"{kind.__module__}.{kind.__qualname__}" in _USER_ERRORS for kind in type(error).__mro__
    )


if __name__ == "__main__":
    main()
