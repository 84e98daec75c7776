"""``kronos-stream schema``: machine-readable documents of messages, topics and HTTP endpoints."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument(
    "message",
    type=click.Choice(["forecast", "removal", "deadletter", "candle"]),
    default="forecast",
    metavar="[MESSAGE]",
)
@click.option("--asyncapi", is_flag=True, help="Print AsyncAPI 3.0 of all topics and messages.")
@click.option("--openapi", is_flag=True, help="Print OpenAPI 3.1 of the daemon's HTTP endpoints.")
@click.option(
    "--write",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Write all documents to a folder: schemas/*.json, asyncapi.json, openapi.json.",
)
def schema(message: str, asyncapi: bool, openapi: bool, write: Path | None) -> None:  # noqa: FBT001
    """Print the JSON Schema of a message's value; by default, of a forecast.

    MESSAGE is forecast, removal, deadletter or candle.

    Within a version, messages only gain optional fields; readers should ignore unknown ones.
    """
    from kronos_stream.daemon.status import openapi as pages
    from kronos_stream.forecast import contract

    if write is not None:
        for path in contract.write_documents(write, contract.documents() | pages.documents()):
            click.echo(path)
        return
    document = contract.asyncapi() if asyncapi else contract.json_schema(message)
    if openapi:
        document = pages.document()
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))
