"""JSON Schema and AsyncAPI 3 documents of the messages on the topics.

They are generated from the models of :mod:`kronos_stream.forecast.message`. The files under
``docs/`` are written by ``kronos-stream schema --write docs``; a test compares them with the code.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from kronos_stream.atomic import atomic_write
from kronos_stream.forecast.compose import SOURCE
from kronos_stream.forecast.message import (
    DEAD_LETTER,
    FORECAST,
    REMOVAL,
    DeadLetter,
    Forecast,
    Removal,
)
from kronos_stream.market.candle_message import CANDLE, CandleMessage

MESSAGES: dict[str, type[BaseModel]] = {
    "forecast": Forecast,
    "removal": Removal,
    "deadletter": DeadLetter,
    "candle": CandleMessage,
}
"""Message models by the name of their schema file."""

_NAMES = {"forecast": FORECAST, "removal": REMOVAL, "deadletter": DEAD_LETTER, "candle": CANDLE}

_CHANNELS = {
    "forecasts": (
        "{prefix}.forecasts.v1",
        ("forecast", "removal"),
        "Every forecast, at least once, in order per series; and removals of series.",
    ),
    "latest": (
        "{prefix}.forecasts.latest.v1",
        ("forecast",),
        "As forecasts, compacted: at least the newest per series; no value after its removal.",
    ),
    "deadletter": (
        "{prefix}.deadletter.v1",
        ("deadletter",),
        "Input that could not be processed and records that could not be delivered, and why.",
    ),
    "candles": (
        "{prefix}.candles.{timeframe}.v1",
        ("candle", "removal"),
        "Closed bars, the input of forecasts, in order per series; and removals of series.",
    ),
}

_KEYS = {
    "forecast": "The series, such as binance:BTC/USDT:5m.",
    "removal": "The series, such as binance:BTC/USDT:5m.",
    "deadletter": "The series, if known; else empty.",
    "candle": "The series, such as kafka:BTC/USDT:5m; optional if the value names it.",
}


def json_schema(name: str) -> dict[str, Any]:
    """The JSON Schema of a message's value, draft 2020-12."""
    schema = MESSAGES[name].model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def asyncapi() -> dict[str, Any]:
    """All topics and their messages as AsyncAPI 3.0."""
    _, schemas = models_json_schema(
        [(model, "validation") for model in MESSAGES.values()],
        ref_template="#/components/schemas/{model}",
    )
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "kronos-stream",
            "version": "1",
            "description": "Probabilistic forecasts of market candles, made at every bar close. "
            "Within a topic's version, messages only gain optional fields; readers should ignore "
            "unknown ones.",
            "license": {"name": "MIT"},
        },
        "defaultContentType": "application/json",
        "channels": {name: _channel(*about) for name, about in _CHANNELS.items()},
        "operations": {
            name: {
                "action": "receive" if name == "candles" else "send",
                "channel": {"$ref": f"#/channels/{name}"},
                "messages": [{"$ref": f"#/channels/{name}/messages/{kind}"} for kind in kinds],
            }
            for name, (_, kinds, _) in _CHANNELS.items()
        },
        "components": {
            "messages": {name: _message(name) for name in MESSAGES},
            "schemas": schemas["$defs"],
        },
    }


def documents() -> dict[str, str]:
    """All documents of messages: path → text."""
    schemas = {f"schemas/{name}.json": _text(json_schema(name)) for name in MESSAGES}
    return schemas | {"asyncapi.json": _text(asyncapi())}


def write_documents(folder: Path, documents: Mapping[str, str]) -> list[Path]:
    """Write ``documents``, path → text, to ``folder``; returns the paths written."""
    paths = []
    for name, text in documents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_text(text, "utf-8")
        paths.append(path)
    return paths


def _channel(address: str, messages: Sequence[str], description: str) -> dict[str, Any]:
    parameters = {
        "prefix": {"default": "kronos", "description": "KRONOS_STREAM_KAFKA__TOPIC_PREFIX."},
        "timeframe": {"description": "Length of a bar, such as 5m."},
    }
    return {
        "address": address,
        "description": description,
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
        "parameters": {name: text for name, text in parameters.items() if f"{{{name}}}" in address},
    }


def _message(name: str) -> dict[str, Any]:
    model = MESSAGES[name]
    # Senders of candles need not set CloudEvents headers.
    headers = {} if name == "candle" else {"headers": _headers(name)}
    return {
        "name": _NAMES[name],
        "title": model.__name__,
        "summary": (inspect.getdoc(model) or "").partition("\n")[0],
        "contentType": "application/json",
        **headers,
        "payload": {"$ref": f"#/components/schemas/{model.__name__}"},
        "bindings": {"kafka": {"key": {"type": "string", "description": _KEYS[name]}}},
    }


def _headers(name: str) -> dict[str, Any]:
    """CloudEvents attributes in binary mode."""
    attributes: dict[str, dict[str, Any]] = {
        "ce_specversion": {"const": "1.0"},
        "ce_id": {"description": "The message's id."},
        "ce_type": {"const": _NAMES[name]},
        "ce_source": {"const": SOURCE},
        "ce_time": {"format": "date-time"},
        "content-type": {"const": "application/json"},
    }
    return {
        "type": "object",
        "properties": {key: {"type": "string", **rest} for key, rest in attributes.items()},
        "required": list(attributes),
    }


def _text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
