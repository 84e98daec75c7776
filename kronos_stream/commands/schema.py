"""``kronos-stream schema``: what is on the topics, for programs."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("message", type=click.Choice(["forecast", "deadletter"]), default="forecast")
@click.option("--asyncapi", is_flag=True, help="Print AsyncAPI 3.0 of all topics and messages.")
@click.option(
    "--write",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Write all of it into a folder: schemas/*.json and asyncapi.json.",
)
def schema(message: str, asyncapi: bool, write: Path | None) -> None:  # noqa: FBT001
    """Print the JSON Schema of a message's value: of a forecast, or of a dead letter.

    Within a version, messages only gain optional fields: ignore what you do not know.
    """
    from kronos_stream.forecast import contract

    if write is not None:
        for path in contract.write(write):
            click.echo(path)
        return
    document = contract.asyncapi() if asyncapi else contract.json_schema(message)
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))
