"""``kronos-stream train tokenizer|predictor``, with the fields of TrainSettings as options."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from kronos_stream.training.progress import ProgressReport
from kronos_stream.training.settings import Stage, TrainSettings, read_recipe


@click.group()
def train() -> None:
    """Train a tokenizer, then a predictor on its tokens; or fine-tune trained ones.

    A run can be stopped at any time; the same command resumes it from its last checkpoint. Under
    torchrun (torchrun --nproc-per-node 2 -m kronos_stream train ...) the processes divide each
    batch.
    """


def _options(stage: Stage) -> Callable[[Callable[..., None]], Callable[..., None]]:
    defaults = TrainSettings.defaults(stage)

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for setting in reversed(fields(TrainSettings)):
            if setting.name == "data":
                continue
            default = getattr(defaults, setting.name)
            flag = setting.name.replace("_", "-")
            help_text = f"{setting.metadata['help']}"
            if default not in ("", ()):
                shown = ",".join(default) if isinstance(default, tuple) else default
                help_text += f" [{str(shown).lower() if isinstance(shown, bool) else shown}]"
            kind: Any = type(default)
            if setting.metadata["choices"]:
                kind = click.Choice(setting.metadata["choices"])
            elif isinstance(default, tuple):
                kind = str
            if isinstance(default, bool):
                option = click.option(
                    f"--{flag}/--no-{flag}", setting.name, default=None, help=help_text
                )
            else:
                option = click.option(
                    f"--{flag}", setting.name, type=kind, default=None, help=help_text
                )
            command = option(command)
        return command

    return add


def _command(stage: Stage, summary: str, text: str) -> click.Command:
    @click.command(stage, help=text, short_help=summary)
    @click.argument("data", nargs=-1)
    @click.option(
        "--out",
        type=click.Path(path_type=Path, file_okay=False),
        required=True,
        help="Folder of the run: its state, metrics and, at the end, the checkpoint.",
    )
    @click.option(
        "--recipe",
        type=click.Path(path_type=Path),
        default=None,
        help="TOML file with tables of settings; options take precedence.",
    )
    @click.option("--table", default=stage, show_default=True, help="Table of the recipe to use.")
    @_options(stage)
    def command(out: Path, recipe: Path | None, table: str, **options: Any) -> None:  # noqa: ANN401
        from kronos_stream.training.train import train as run

        chosen = {k: v for k, v in options.items() if v not in (None, ())}
        if isinstance(chosen.get("timeframes"), str):
            chosen["timeframes"] = tuple(chosen["timeframes"].split(","))
        settings = TrainSettings.build(stage, read_recipe(recipe, table) if recipe else {}, chosen)
        with ProgressReport(stage, settings.steps, sys.stderr) as report:
            result = run(stage, settings, out, report)
        if result is None:
            click.echo(
                "note: too few bars for a held-out part, so there was no validation and no early "
                "stopping (see --valid-share)",
                err=True,
            )
        else:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in result.figures.items())
            click.echo(f"held out: {shown}", err=True)
        click.echo(f"written to {out}", err=True)

    return command


train.add_command(
    _command(
        "tokenizer",
        "Train a tokenizer on candles.",
        "Train a tokenizer on candle files, folders of them, or 'generated' markets.",
    )
)
train.add_command(
    _command(
        "predictor",
        "Train a predictor on a tokenizer's tokens.",
        "Train a predictor on the tokens of a trained tokenizer.",
    )
)
