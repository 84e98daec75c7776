"""The pages as a document, OpenAPI 3.1: served as /openapi.json, and kept in ``docs/openapi.json``.

The models say what is on the pages; those are written without them, and tests hold both together.
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


class _Page(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Problem(_Page):
    """Why there is no such page, or not for whoever asked."""

    error: str
    """For people."""


class Readiness(_Page):
    """Whether forecasts are made and delivered."""

    ready: bool
    """True where every check is ok."""
    checks: dict[str, str]
    """What it hangs on, by name: ok, or why it is not so."""


class LastBar(_Page):
    """A closed bar."""

    open_time: Time
    """When it opened."""
    close: float
    """Closing price."""
    revision: int
    """How often the venue changed it after its close."""
    synthetic: bool
    """True where the venue does not have it, or has not given it yet."""


class LastOutcome(_Page):
    """What became of a bar that was due."""

    origin: Time
    """Open of the bar."""
    revision: int
    """Of the bar."""
    result: Literal["forecast", "skipped"]
    """What became of it."""
    reason: str | None
    """Why it was skipped: overrun, stale, gap, warming up, revised, failed."""


class LastForecast(_Page):
    """The newest forecast, in short."""

    origin: Time
    """Open of its origin bar."""
    revision: int
    """Of that bar."""
    degraded: bool
    """True where something in its context should not be trusted."""
    reasons: tuple[str, ...]
    """Why it is degraded, for people."""
    latency_ms: Latency


class SeriesState(_Page):
    """How one series stands."""

    series: str
    """venue:symbol:timeframe."""
    state: SeriesStatus
    """starting: no bar is known yet; live: its next bar is expected in time; held: bars wait for
    missing ones; silent: neither pushes nor the history have its next bar; late: its next bar has
    not come within a minute, and why is not known."""
    last_bar: LastBar | None
    next_due: Time | None
    """When the next bar closes."""
    held: int
    """Bars that wait for missing ones."""
    owed: int
    """Bars made up for now, because the venue's history could not be had."""
    last_outcome: LastOutcome | None
    """Of the newest bar that was due since this process began."""
    last_forecast: LastForecast | None
    """Of this process, too; whole it is at /forecasts/SERIES."""


class AllSeries(_Page):
    """Every series that is followed."""

    at: Time
    """When this was written; for a second it stays as it is."""
    series: tuple[SeriesState, ...]
    """By name."""


_MODELS: tuple[type[BaseModel], ...] = (Problem, Readiness, AllSeries, Forecast)

_TEXT = {"text/plain": {"schema": {"type": "string"}}}
_UNAUTHORISED = "The token is missing or wrong."
_LOOPBACK_ONLY = "No token is set, so only this machine may ask, and the daemon listens on more."


def document() -> dict[str, Any]:
    """The whole of it."""
    _, schemas = models_json_schema(
        [(model, "validation") for model in _MODELS], ref_template="#/components/schemas/{model}"
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kronos-stream",
            "version": "1",
            "description": "What a daemon that forecasts market candles tells of itself. Pages "
            "only gain optional fields; ignore what you do not know.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [
            {"url": "http://127.0.0.1:8080", "description": "Where it listens by default."}
        ],
        "security": [{"token": []}, {}],
        "paths": {
            "/healthz": _probe(
                "alive",
                "Whether the process answers, and nothing in it hangs. Who waits for an exchange, "
                "for a broker or for a new worker does not hang.",
                {
                    "200": ("All is well.", _TEXT),
                    "503": ("Something hangs; only a restart will mend that.", _TEXT),
                },
            ),
            "/readyz": _probe(
                "ready",
                "Whether forecasts are made and delivered, and if not, why.",
                {
                    "200": ("They are.", _json(Readiness)),
                    "503": ("They are not, for the reasons given.", _json(Readiness)),
                },
            ),
            "/metrics": _page(
                "metrics", "Counters and timings, for Prometheus.", {"200": ("Text.", _TEXT)}
            ),
            "/series": _page(
                "series",
                "How each series stands.",
                {
                    "200": ("All series.", _json(AllSeries)),
                    "403": (_LOOPBACK_ONLY, _json(Problem)),
                },
            ),
            "/forecasts/{series}": {
                "parameters": [_SERIES],
                **_page(
                    "forecast",
                    "The newest forecast of a series, as on the topic.",
                    {
                        "200": ("The message.", _json(Forecast)),
                        "403": (_LOOPBACK_ONLY, _json(Problem)),
                        "404": ("There is none, for the reason given.", _json(Problem)),
                    },
                ),
            },
            "/openapi.json": _page(
                "openapi",
                "This document.",
                {"200": ("OpenAPI 3.1.", {"application/json": {"schema": {"type": "object"}}})},
            ),
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "KRONOS_STREAM_HTTP__TOKEN, where it is set.",
                }
            },
        },
    }


def documents() -> dict[str, str]:
    """It as a file: path → text."""
    return {"openapi.json": json.dumps(document(), indent=2, ensure_ascii=False) + "\n"}


_SERIES: Mapping[str, Any] = {
    "name": "series",
    "in": "path",
    "required": True,
    "description": "venue:symbol:timeframe; slashes may be percent-encoded or not.",
    "schema": {"type": "string", "pattern": _PATTERN},
    "example": "binance:BTC/USDT:5m",
}

_Responses = Mapping[str, tuple[str, Mapping[str, Any]]]
"""By status: what it means, and what comes with it."""


def _probe(name: str, about: str, answers: _Responses) -> dict[str, Any]:
    """A page that never asks for the token."""
    operation = _operation(name, f"{about} Never needs the token.", answers)
    return {"get": {**operation, "security": []}}


def _page(name: str, about: str, answers: _Responses) -> dict[str, Any]:
    refusal = (_UNAUTHORISED, _json(Problem))
    operation = _operation(name, about, {**answers, "401": refusal})
    operation["responses"]["401"]["headers"] = {
        "WWW-Authenticate": {"schema": {"type": "string"}, "description": "Bearer."}
    }
    return {"get": operation}


def _operation(name: str, about: str, answers: _Responses) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": about,
        "responses": {
            status: {"description": meaning, "content": content}
            for status, (meaning, content) in sorted(answers.items())
        },
    }


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
