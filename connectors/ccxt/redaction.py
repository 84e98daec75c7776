"""What of ``CCXT__CONFIG`` must not be seen: ccxt's errors repeat addresses."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

_MIN_SECRET_CHARACTERS = 6
"""Characters; less would hide half of every error."""

_PUBLIC_SECTIONS = {"options", "urls"}
"""Parts of a config whose values are ordinary words, unless they are named like secrets."""

_SECRET_NAME = re.compile(r"(?i)key|secret|passw|token|auth|sign|cookie|login|uid|twofa|wallet")

_URL = re.compile(r"^(\w+://)(?:[^/@]*@)?([^/?#]*)(.*)$")


class Redactor:
    """Takes what is secret of an exchange's config out of texts."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        found = {
            text
            for text in _secret_values(config, plain=False)
            if len(text) >= _MIN_SECRET_CHARACTERS
        }
        self._texts = sorted(found, key=len, reverse=True)

    def redact(self, text: str) -> str:
        for secret in self._texts:
            text = text.replace(secret, "***")
        return text


def _secret_values(value: object, *, plain: bool) -> Iterator[str]:
    """All that may be secret in a part of a config. plain: whether ordinary words are not."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            named = _SECRET_NAME.search(str(name)) is not None
            yield from _secret_values(
                inner, plain=not named and (plain or name in _PUBLIC_SECTIONS)
            )
    elif isinstance(value, Collection) and not isinstance(value, str):
        for inner in value:
            yield from _secret_values(inner, plain=plain)
    elif isinstance(value, str) and (address := _URL.match(value)):
        yield from _url_secrets(value, address)
    elif isinstance(value, (str, int)) and not isinstance(value, bool) and not plain:
        yield str(value)


def _url_secrets(whole: str, address: re.Match[str]) -> Iterator[str]:
    """Of a URL: a login, what stands in the path, and what is asked."""
    scheme, _, rest = address.groups()
    login = whole.removeprefix(scheme).partition("@")[0] if "@" in whole else ""
    yield from re.split(r"[:/]", login)
    yield login
    yield from (part for part in re.split(r"[/?&=#]", rest) if not part.startswith("{"))
