"""The OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from kronos_stream.cli import main
from kronos_stream.daemon.status import openapi
from tests.support.paths import ROOT
from tests.support.status_harness import StatusHarness, content


def test_checked_in_document_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in openapi.documents().items():
        file = ROOT / "docs" / name
        assert file.read_text("utf-8") == text, "run: kronos-stream schema --write docs"
    with pytest.raises(SystemExit):
        main(["schema", "--openapi"])
    assert json.loads(capsys.readouterr().out) == openapi.document()


async def test_document_describes_every_endpoint() -> None:
    harness = StatusHarness()
    assert content(await harness.get("/openapi.json")) == openapi.document()
    routes = {resource.canonical for resource in harness.endpoints.app.router.resources()}
    assert set(openapi.document()["paths"]) == routes


def test_document_is_valid() -> None:
    document = openapi.document()
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    references = list(_references(document))
    assert len(references) > 20
    for reference in references:
        found = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
    operations = [path["get"] for path in document["paths"].values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for name, path in document["paths"].items():
        declared = [f"{{{parameter['name']}}}" for parameter in path.get("parameters", ())]
        assert all(parameter in name for parameter in declared)
        assert name.count("{") == len(declared)
        assert ("401" in path["get"]["responses"]) is ("security" not in path["get"])


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if "$ref" in part:
            yield part["$ref"]
        for inner in part.values():
            yield from _references(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _references(inner)
