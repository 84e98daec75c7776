"""Published schemas: equal to the code, valid for written messages, and backward compatible."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from jsonschema import Draft202012Validator

from kronos_connectors.kafka import topics
from kronos_stream.bars.window import Window
from kronos_stream.cli import main
from kronos_stream.forecast import contract
from kronos_stream.forecast.compose import Composer, dead_letter
from kronos_stream.forecast.message import Engine, Latency, Model, Sampling
from kronos_stream.forecast.outlook import PublishedPaths, build_outlook
from kronos_stream.market.candle import Candle
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from tests.support.paths import DATA, ROOT

_DOCS = ROOT / "docs"
_PUBLISHED = DATA / "contract"
"""Schemas of version 1 as first published; never changed."""

Json = dict[str, Any]


def test_documents_are_up_to_date() -> None:
    for name, text in contract.documents().items():
        assert (_DOCS / name).read_text("utf-8") == text, "run: kronos-stream schema --write docs"


@pytest.mark.parametrize("name", contract.MESSAGES)
def test_schema_is_compatible_with_the_first_published_one(name: str) -> None:
    published = json.loads((_PUBLISHED / f"{name}.json").read_text("utf-8"))
    assert list(_incompatibilities(published, contract.json_schema(name))) == []


def test_incompatible_changes_are_detected() -> None:
    schema = contract.json_schema("forecast")

    def broken(change: str) -> list[str]:
        other = copy.deepcopy(schema)
        exec(change, {"s": other, "d": other["$defs"]})  # noqa: S102 - our own lines
        return list(_incompatibilities(schema, other))

    assert broken("s['properties']['mood'] = {'type': 'string'}") == []
    assert broken("d['Engine']['description'] = 'Other words.'") == []
    assert broken("del s['properties']['id']; s['required'].remove('id')")
    assert broken("s['required'].remove('id')")
    assert broken("d['Engine']['required'].append('cores')")
    assert broken("d['Engine']['properties']['device']['type'] = 'integer'")
    assert broken("d['Context']['properties']['amount']['enum'].append('guessed')")
    assert broken("s['properties']['schema']['const'] = 'kronos.forecast/2'")


@pytest.mark.parametrize("publish", ["none", "close", "ohlcva"])
def test_forecast_is_valid(publish: PublishedPaths) -> None:
    _check_all("forecast", _forecast(publish=publish))


@pytest.mark.parametrize("payload", [b"{", b"\xff"])
def test_dead_letter_is_valid(payload: bytes) -> None:
    letter = dead_letter("frame", "not JSON", payload, at=1_718_709_300_000, series="x:A:1m")
    _check_all("deadletter", orjson.loads(letter.value))


def test_asyncapi_has_the_topics_of_the_sink() -> None:
    document = contract.asyncapi()
    assert document["asyncapi"] == "3.0.0"
    written: dict[str, list[str]] = {}
    for kind in ("forecast", "removal", "deadletter", "candle"):
        for topic in topics.topics_for_record("kronos", kind, "binance:BTC/USDT:5m"):
            written.setdefault(topic, []).append(kind)
    written[topics.latest_topic("kronos")].remove("removal")  # a record without a value
    written[topics.candle_topic("kronos", Timeframe(5, "m"))].append("removal")
    named = {
        channel["address"].format(prefix="kronos", timeframe="5m"): list(channel["messages"])
        for channel in document["channels"].values()
    }
    assert named == written


def test_references_in_asyncapi_have_targets() -> None:
    document = contract.asyncapi()
    found = list(_references(document))
    assert len(found) > 10
    for reference in found:
        _resolve(document, reference)
    sent = {operation["channel"]["$ref"] for operation in document["operations"].values()}
    assert sent == {f"#/channels/{name}" for name in document["channels"]}


def test_asyncapi_describes_the_headers() -> None:
    letter = dead_letter("frame", "not JSON", b"{", at=1_718_709_300_000)
    sent = {name: value.decode() for name, value in letter.headers}
    described = contract.asyncapi()["components"]["messages"]["deadletter"]["headers"]
    assert _errors(described, sent) == []
    assert list(sent) == described["required"]


def test_every_field_has_a_description() -> None:
    for name in contract.MESSAGES:
        schema = contract.json_schema(name)
        for owner in (schema, *schema.get("$defs", {}).values()):
            for field, about in owner["properties"].items():
                if "$ref" not in about:
                    assert about.get("description", "").endswith("."), (owner["title"], field)


def test_command_prints_and_writes_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exited:
            main(["schema", *arguments])
        assert exited.value.code == 0
        return capsys.readouterr().out

    assert json.loads(run()) == contract.json_schema("forecast")
    assert json.loads(run("deadletter")) == contract.json_schema("deadletter")
    assert json.loads(run("--asyncapi")) == contract.asyncapi()
    run("--write", str(tmp_path / "new"))
    written = {str(p.relative_to(tmp_path / "new")) for p in tmp_path.rglob("*.json")}
    assert written == {*contract.documents(), "openapi.json"}


def _forecast(*, publish: PublishedPaths) -> Json:
    random = np.random.default_rng(0)
    series = Series.parse("binance:BTC/USDT:5m")
    values = random.uniform(1, 2, (10, 6)).astype(np.float32)
    times = 300_000 * np.arange(10)
    last = Candle(2_700_000, *values[-1].tolist())
    paths = random.uniform(1, 2, (20, 3, 6)).astype(np.float32)
    outlook = build_outlook(paths, [3_000_000, 3_300_000, 3_600_000], 0.0, [0.5], publish=publish)
    composer = Composer(
        Model(name="nano", revision=None, tokenizer="nano"),
        Engine(version="0", device="cpu", dtype="float32"),
        Sampling(paths=20, temperature=1.0, top_k=0, top_p=0.9, seed=0, anchor=True),
    )
    written = composer.forecast(
        Window(series, values, times, 1, 0, last, ("1 synthetic bar",)),
        outlook,
        created=3_000_123,
        latency=Latency(close_to_received=1, queued=2, compute=3),
    )
    message: Json = orjson.loads(written.value)
    return message


def _check_all(name: str, message: Json) -> None:
    """Check that the message is valid, and is not with a field missing or of a wrong type."""
    schema = contract.json_schema(name)
    assert _errors(schema, message) == []
    for field in message:
        bad = message | {field: {"nonsense": [[[]]]}}
        assert _errors(schema, bad), field
    for field in schema["required"]:
        bad = {key: value for key, value in message.items() if key != field}
        assert _errors(schema, bad), field


def _errors(schema: Json, value: Any) -> list[str]:
    """Errors of the validation of ``value``."""
    Draft202012Validator.check_schema(schema)
    return [error.message for error in Draft202012Validator(schema).iter_errors(value)]


def _incompatibilities(old: Json, new: Json, where: str = "") -> Iterator[str]:
    """Changes from ``old`` to ``new`` that are incompatible with readers of ``old``."""
    for key in (old.keys() | new.keys()) - {"title", "description", "default", "$schema"}:
        before, after = old.get(key), new.get(key)
        if key in {"properties", "$defs"}:
            before, after = before or {}, after or {}
            for name in before:
                if name in after:
                    yield from _incompatibilities(before[name], after[name], f"{where}/{name}")
                else:
                    yield f"{where}/{name} is missing"
        elif key == "required":
            if set(before or ()) != set(after or ()):
                yield f"{where}: other fields are required"
        elif before != after:
            yield f"{where}: {key} was {before}, is {after}"


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if "$ref" in part:
            yield part["$ref"]
        for inner in part.values():
            yield from _references(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _references(inner)


def _resolve(root: Json, reference: str) -> Json:
    found = root
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    return found
