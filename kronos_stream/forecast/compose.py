"""Composition of messages, directly as JSON because there may be a thousand per second.

A test checks that :mod:`kronos_stream.forecast.message` reads and writes the same bytes.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from kronos_stream.bars.window import Window
from kronos_stream.forecast.message import (
    DEAD_LETTER,
    FORECAST,
    REMOVAL,
    VOLATILE,
    Engine,
    Latency,
    Model,
    Sampling,
)
from kronos_stream.forecast.outlook import Outlook
from kronos_stream.interfaces.sink import Envelope, RecordKind
from kronos_stream.market.candle import Bar
from kronos_stream.market.candle_message import CANDLE, encode_bar
from kronos_stream.market.series import Series
from kronos_stream.market.utc import rfc3339

SOURCE = "kronos-stream"
"""CloudEvents source of all messages."""

MAX_PAYLOAD = 64 * 1024
"""Bytes of the original data that a dead letter contains."""

_MAX_REASON = 2_000
_DIGEST_BYTES = 16
_BANDS = ("close", "open", "high", "low", "volume")
_PATHS = ("paths", "other_paths")
_NOT_INPUTS = {"id", *VOLATILE, *_BANDS, *_PATHS, "summary", "repaired"}


class Composer:
    """Composes forecast messages of one model, engine and sampling."""

    def __init__(self, model: Model, engine: Engine, sampling: Sampling) -> None:
        self._provenance = {
            "model": model.to_dict(),
            "engine": engine.to_dict(),
            "sampling": sampling.to_dict(),
        }

    def forecast(
        self,
        window: Window,
        outlook: Outlook,
        *,
        created: int,
        latency: Latency,
        scale: float = 1.0,
    ) -> Envelope:
        """Compose the message of the forecast ``outlook`` made from ``window``.

        created: UTC ms. scale: factor applied to prices for the model.
        """
        series, origin, times = window.series, window.last, window.times
        _, opened, high, low, close, volume, _ = origin
        message: dict[str, Any] = {
            "schema": FORECAST,
            "id": "",
            "series": series.name,
            "venue": series.venue,
            "symbol": series.symbol,
            "timeframe": str(series.timeframe),
            "origin": rfc3339(origin.time),
            "revision": window.revision,
            "valid_until": rfc3339(series.timeframe.after(origin.time, 2)),
            "created_at": rfc3339(created),
            "degraded": bool(window.reasons),
            "reasons": window.reasons,
            **self._provenance,
            "context": {
                "bars": len(times),
                "first": rfc3339(int(times[0])),
                "synthetic": window.synthetic,
                "amount": "reported" if window.values.shape[1] == 6 else "derived",
                "digest": context_digest(window.values, times, scale),
                "scale": scale,
            },
            "last": {"open": opened, "high": high, "low": low, "close": close, "volume": volume},
            "times": [rfc3339(time) for time in outlook.times],
            **{name: outlook.channels[name] for name in _BANDS},
            "summary": outlook.summary.to_dict(),
            "repaired": outlook.repaired,
            "latency_ms": latency.to_dict(),
        }
        if outlook.paths is not None:
            message["paths"] = outlook.paths
        if outlook.other_paths is not None:
            message["other_paths"] = outlook.other_paths
        message["id"] = forecast_id(message)
        return _envelope("forecast", message, series.name, created)


def dead_letter(
    what: Literal["frame", "candle", "record"],
    reason: str,
    payload: bytes,
    *,
    at: int,
    series: str | None = None,
    sink: str | None = None,
) -> Envelope:
    """Compose the message of invalid or refused data. at: UTC ms."""
    encoding, text = _as_text(payload[:MAX_PAYLOAD])
    message = {
        "schema": DEAD_LETTER,
        "id": "",
        "at": rfc3339(at),
        "what": what,
        "series": series,
        "reason": reason[:_MAX_REASON],
        "sink": sink,
        "payload": text,
        "encoding": encoding,
        "truncated": len(payload) > MAX_PAYLOAD,
    }
    message["id"] = _digest(orjson.dumps(message))
    return _envelope("deadletter", message, series or "", at)


def candle(series: Series, bar: Bar, *, history: bool, at: int) -> Envelope:
    """Compose the message of a closed bar. at: UTC ms.

    history: whether the bar only fills contexts, without a forecast.
    """
    value = encode_bar(series, bar, history=history)
    return _cloud_event("candle", _digest(value), CANDLE, series.name, value, at)


def removal(series: str, *, at: int) -> Envelope:
    """Compose the message that a series is no longer forecast. at: UTC ms."""
    message = {"schema": REMOVAL, "id": "", "at": rfc3339(at), "series": series}
    message["id"] = _digest(orjson.dumps(message))
    return _envelope("removal", message, series, at)


def forecast_id(message: Mapping[str, Any]) -> str:
    """Return the id of a forecast given as in JSON: a hash of all inputs of its numbers.

    These are all fields except ``id``, ``created_at``, ``latency_ms`` and the forecast itself, and
    the names of its bands and paths. On a CPU in float32 the same inputs give the same numbers; on
    a GPU single tokens may differ.
    """
    inputs = {name: value for name, value in message.items() if name not in _NOT_INPUTS}
    inputs["bands"] = list(message["close"])
    inputs["with_paths"] = [name for name in _PATHS if message.get(name) is not None]
    return _digest(orjson.dumps(inputs, option=orjson.OPT_SORT_KEYS))


def context_digest(
    values: NDArray[np.float32], times: NDArray[np.int64], scale: float = 1.0
) -> str:
    """Hash a context: values (L, 5 | 6) row by row, times (L,) and scale, little-endian."""
    digest = blake2b(np.ascontiguousarray(values, "<f4").data, digest_size=_DIGEST_BYTES)
    digest.update(np.ascontiguousarray(times, "<i8").data)
    digest.update(np.float64(scale).astype("<f8").tobytes())
    return digest.hexdigest()


def _envelope(kind: RecordKind, message: Mapping[str, Any], key: str, at: int) -> Envelope:
    value = orjson.dumps(message)
    return _cloud_event(kind, message["id"], message["schema"], key, value, at)


def _cloud_event(
    kind: RecordKind, event_id: str, event_type: str, key: str, value: bytes, at: int
) -> Envelope:
    """Wrap a message in CloudEvents' binary mode: attributes are headers, the value is the data."""
    attributes = {
        "ce_specversion": "1.0",
        "ce_id": event_id,
        "ce_type": event_type,
        "ce_source": SOURCE,
        "ce_time": rfc3339(at),
        "content-type": "application/json",
    }
    headers = tuple((name, text.encode()) for name, text in attributes.items())
    return Envelope(kind, key, value, headers)


def _as_text(payload: bytes) -> tuple[Literal["text", "base64"], str]:
    """Encode bytes for JSON; a character that is cut off at the end is left out."""
    try:
        return "text", payload.decode()
    except UnicodeDecodeError as error:
        if len(payload) == MAX_PAYLOAD and error.start > MAX_PAYLOAD - 4:
            return "text", payload[: error.start].decode()
    return "base64", base64.b64encode(payload).decode()


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()
