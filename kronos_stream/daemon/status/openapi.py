"""OpenAPI 3.1 document of the endpoints, served as /openapi.json and kept in ``docs/openapi.json``.

The models describe the responses but do not produce them; tests compare the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from kronos_stream.daemon.status.series import SeriesStatus
from kronos_stream.forecast.message import Forecast, Latency, Time

_PATTERN = r"^[^:]+:.+:[1-9][0-9]*[smhdwM]$"


class _Response(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Problem(_Response):
    """An error."""

    error: str
    """Description, in English."""


class Readiness(_Response):
    """Readiness of the daemon: forecasts are made and delivered."""

    ready: bool
    """True if all checks are ok."""
    checks: dict[str, str]
    """Checks by name: ok, or the problem."""


class LastBar(_Response):
    """A closed bar."""

    open_time: Time
    """Open time of the bar."""
    close: float
    """Closing price."""
    revision: int
    """Number of corrections by the venue after the close."""
    synthetic: bool
    """True if the venue has no such bar, or has not provided it yet."""


class LastOutcome(_Response):
    """Outcome of a closed bar that was to be forecast."""

    origin: Time
    """Open time of the bar."""
    revision: int
    """Revision of the bar."""
    result: Literal["forecast", "skipped"]
    """Outcome."""
    reason: str | None
    """Reason of a skip: overrun, stale, gap, warming up, revised, failed."""


class LastForecast(_Response):
    """Summary of the latest forecast."""

    origin: Time
    """Open time of the origin, the last bar that it is based on."""
    revision: int
    """Revision of the origin."""
    degraded: bool
    """True if the bars that it is based on are incomplete or doubtful."""
    reasons: tuple[str, ...]
    """Reasons why it is degraded, in English."""
    latency_ms: Latency


class SeriesState(_Response):
    """State of one series."""

    series: str
    """venue:symbol:timeframe."""
    state: SeriesStatus
    """starting: no bar is known yet; live: up to date; held: bars wait for missing earlier ones;
    silent: neither the stream nor the history of the venue has the next bar; late: the next bar has
    not arrived within a minute after its close, for an unknown reason."""
    last_bar: LastBar | None
    next_due: Time | None
    """Close time of the next bar."""
    held: int
    """Number of bars that wait for missing earlier ones."""
    owed: int
    """Number of placeholders for bars that could not be fetched from the venue yet."""
    last_outcome: LastOutcome | None
    """Latest outcome since the start of this process."""
    last_forecast: LastForecast | None
    """Latest forecast since the start of this process; /forecasts/SERIES has the whole message."""


class AllSeries(_Response):
    """All followed series."""

    at: Time
    """Time of this response; it is reused for a second."""
    series: tuple[SeriesState, ...]
    """Sorted by name."""


_MODELS: tuple[type[BaseModel], ...] = (Problem, Readiness, AllSeries, Forecast)

_TEXT = {"text/plain": {"schema": {"type": "string"}}}
_UNAUTHORISED = "The token is missing or wrong."
_LOOPBACK_ONLY = "No token is set, and the daemon listens on other addresses than 127.0.0.1."


def document() -> dict[str, Any]:
    """Build the document."""
    _, schemas = models_json_schema(
        [(model, "validation") for model in _MODELS], ref_template="#/components/schemas/{model}"
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kronos-stream",
            "version": "1",
            "description": "Status of a daemon that forecasts market candles. Responses only gain "
            "optional fields; ignore fields that you do not know.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "http://127.0.0.1:8080", "description": "Default address."}],
        "security": [{"token": []}, {}],
        "paths": _paths(),
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "KRONOS_STREAM_HTTP__TOKEN, if it is set.",
                }
            },
        },
    }


def documents() -> dict[str, str]:
    """Return the document as a file: path → text."""
    return {"openapi.json": json.dumps(document(), indent=2, ensure_ascii=False) + "\n"}


def _paths() -> dict[str, Any]:
    forbidden = {"403": (_LOOPBACK_ONLY, _json(Problem))}
    return {
        "/healthz": _probe(
            "alive",
            "Liveness: the process answers, and no task is stalled. Waiting for an exchange, a "
            "broker or a new worker is no stall.",
            {
                "200": ("No task is stalled.", _TEXT),
                "503": ("A task is stalled; a restart is necessary.", _TEXT),
            },
        ),
        "/readyz": _probe(
            "ready",
            "Readiness: forecasts are made and delivered; otherwise, the problems.",
            {"200": ("Ready.", _json(Readiness)), "503": ("Not ready.", _json(Readiness))},
        ),
        "/metrics": _endpoint(
            "metrics", "Metrics for Prometheus.", {"200": ("Text format of Prometheus.", _TEXT)}
        ),
        "/series": _endpoint(
            "series",
            "State of each series.",
            {"200": ("All series.", _json(AllSeries))} | forbidden,
        ),
        "/forecasts/{series}": {
            "parameters": [_SERIES],
            **_endpoint(
                "forecast",
                "Latest forecast of a series, as on the topic.",
                {
                    "200": ("The message.", _json(Forecast)),
                    "404": ("There is no forecast; the error gives the reason.", _json(Problem)),
                }
                | forbidden,
            ),
        },
        "/openapi.json": _endpoint(
            "openapi",
            "This document.",
            {"200": ("OpenAPI 3.1.", {"application/json": {"schema": {"type": "object"}}})},
        ),
    }


_SERIES: Mapping[str, Any] = {
    "name": "series",
    "in": "path",
    "required": True,
    "description": "venue:symbol:timeframe; slashes may be percent-encoded.",
    "schema": {"type": "string", "pattern": _PATTERN},
    "example": "binance:BTC/USDT:5m",
}

_Responses = Mapping[str, tuple[str, Mapping[str, Any]]]
"""Description and content by status code."""


def _probe(name: str, summary: str, responses: _Responses) -> dict[str, Any]:
    """Endpoint that never needs the token."""
    operation = _operation(name, f"{summary} Never needs the token.", responses)
    return {"get": {**operation, "security": []}}


def _endpoint(name: str, summary: str, responses: _Responses) -> dict[str, Any]:
    unauthorised = (_UNAUTHORISED, _json(Problem))
    operation = _operation(name, summary, {**responses, "401": unauthorised})
    operation["responses"]["401"]["headers"] = {
        "WWW-Authenticate": {"schema": {"type": "string"}, "description": "Bearer."}
    }
    return {"get": operation}


def _operation(name: str, summary: str, responses: _Responses) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "responses": {
            status: {"description": description, "content": content}
            for status, (description, content) in sorted(responses.items())
        },
    }


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
