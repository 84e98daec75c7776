"""What of ``CCXT__CONFIG`` must not be seen: ccxt's errors repeat addresses."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

_SHORTEST = 6
"""Characters; less would hide half of every error."""

_PLAIN = {"options", "urls"}
"""Parts of a config whose values are ordinary words, unless they are named like secrets."""

_NAMED = re.compile(r"(?i)key|secret|passw|token|auth|sign|cookie|login|uid|twofa|wallet")

_ADDRESS = re.compile(r"^(\w+://)(?:[^/@]*@)?([^/?#]*)(.*)$")


class Hidden:
    """Takes what is secret of an exchange's config out of texts."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        found = {text for text in _within(config, plain=False) if len(text) >= _SHORTEST}
        self._texts = sorted(found, key=len, reverse=True)

    def out_of(self, text: str) -> str:
        for secret in self._texts:
            text = text.replace(secret, "***")
        return text


def _within(value: object, *, plain: bool) -> Iterator[str]:
    """All that may be secret in a part of a config. plain: whether ordinary words are not."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            named = _NAMED.search(str(name)) is not None
            yield from _within(inner, plain=not named and (plain or name in _PLAIN))
    elif isinstance(value, Collection) and not isinstance(value, str):
        for inner in value:
            yield from _within(inner, plain=plain)
    elif isinstance(value, str) and (address := _ADDRESS.match(value)):
        yield from _in_address(value, address)
    elif isinstance(value, (str, int)) and not isinstance(value, bool) and not plain:
        yield str(value)


def _in_address(whole: str, address: re.Match[str]) -> Iterator[str]:
    """Of a URL: a login, what stands in the path, and what is asked."""
    scheme, _, rest = address.groups()
    login = whole.removeprefix(scheme).partition("@")[0] if "@" in whole else ""
    yield from re.split(r"[:/]", login)
    yield login
    yield from (part for part in re.split(r"[/?&=#]", rest) if not part.startswith("{"))
