"""Redaction of secrets in texts."""

from __future__ import annotations

import json

import pytest

from kronos_stream.redaction import Redactor, config_secrets, redact_parameters, shorten

_SECRET = 'pass"wörd\\'  # noqa: S105 - an example


@pytest.mark.parametrize(
    "text",
    [_SECRET, json.dumps(_SECRET), json.dumps(_SECRET, ensure_ascii=False), repr(_SECRET)],
)
def test_secrets_are_masked_in_every_notation(text: str) -> None:
    assert Redactor([_SECRET]).redact(f"got {text}!").strip("'\"") in (
        "got ***!",
        'got "***"!',
        "got '***'!",
    )


def test_longer_secrets_are_masked_before_their_parts() -> None:
    assert Redactor(["password", "password-2"]).redact("password-2, password") == "***, ***"


def test_minimum_length_is_set_per_call() -> None:
    redactor = Redactor(["1234567"])
    assert redactor.redact("1234567") == "1234567"
    redactor.add(["123456", "12345"], min_length=6)
    assert redactor.redact("1234567 12345") == "***7 12345"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("mqtt://me:secret@host:1883/x", "mqtt://me:***@host:1883/x"),
        ("failed: https://:secret@proxy/", "failed: https://:***@proxy/"),
        ("wss://host:9443/ws?a=b@c", "wss://host:9443/ws?a=b@c"),
    ],
)
def test_passwords_in_urls_are_masked(text: str, redacted: str) -> None:
    assert Redactor().redact(text) == redacted


def test_url_parameters_with_names_of_secrets_are_masked() -> None:
    text = "GET /v1?symbol=BTC&apiKey=abc&Signature=def HTTP"
    assert redact_parameters(text) == "GET /v1?symbol=BTC&apiKey=***&Signature=*** HTTP"


def test_secrets_of_a_configuration_are_found() -> None:
    config = {
        "apiKey": "key-value",
        "timeout": 30_000,
        "verbose": True,
        "options": {"defaultType": "future", "brokerToken": "token-value"},
        "headers": [{"X-Some": "header-value"}],
        "httpsProxy": "http://user:proxy-password@proxy.example:3128",
        "urls": {"api": "https://{hostname}/path-part/v1?sig=parameter"},
    }
    found = set(config_secrets(config))
    assert {"key-value", "30000", "token-value", "header-value"} <= found
    assert {"user", "proxy-password", "user:proxy-password", "path-part", "parameter"} <= found
    assert not found & {"future", "True", "proxy.example", "https"}


def test_long_texts_are_cut() -> None:
    assert shorten("12345", 5) == "12345"
    assert shorten("123456", 5) == "1234…"
