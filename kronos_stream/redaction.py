"""Redaction of secrets in texts that are logged, shown or published."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping

_MASK = "***"
_MIN_LENGTH = 8
"""Shorter secrets are not masked: they would also match ordinary words."""

_URL_PASSWORD = re.compile(r"(?<=://)([^/\s:@\"']*):[^/\s@\"']+@")
_PARAMETER = re.compile(r"(?i)\b(api[-_]?key|key|secret|sign(ature)?|token|password)=[^&\s]+")

_PUBLIC_SECTIONS = {"options", "urls"}
"""Parts of a configuration that hold ordinary words, except under names of secrets."""
_SECRET_NAME = re.compile(r"(?i)key|secret|passw|token|auth|sign|cookie|login|uid|twofa|wallet")
_URL = re.compile(r"^(\w+://)(?:[^/@]*@)?([^/?#]*)(.*)$")


class Redactor:
    """Masks known secrets and passwords in URLs."""

    def __init__(self, secrets: Iterable[str] = (), min_length: int = _MIN_LENGTH) -> None:
        self._secrets: list[str] = []
        self.add(secrets, min_length)

    def add(self, secrets: Iterable[str], min_length: int = _MIN_LENGTH) -> None:
        """Mask ``secrets`` of at least ``min_length`` characters from now on."""
        found = set(self._secrets)
        for secret in secrets:
            if len(secret) >= min_length:
                # Also as written in JSON, with and without ASCII escapes, and in Python's repr.
                in_json = (json.dumps(secret, ensure_ascii=ascii_) for ascii_ in (True, False))
                found.update((secret, *(text[1:-1] for text in in_json), repr(secret)[1:-1]))
        self._secrets = sorted(found, key=len, reverse=True)

    def redact(self, text: str) -> str:
        """Replace secrets: ``mqtt://me:secret@host`` becomes ``mqtt://me:***@host``."""
        for secret in self._secrets:
            text = text.replace(secret, _MASK)
        return _URL_PASSWORD.sub(rf"\1:{_MASK}@", text)


_registered = Redactor()


def register_secrets(*secrets: str) -> None:
    """Mask ``secrets`` in all that :func:`redact` returns: logs, error messages, status pages."""
    _registered.add(secrets)


def redact(text: str) -> str:
    """Mask registered secrets and passwords in URLs."""
    return _registered.redact(text)


def redact_parameters(text: str) -> str:
    """Mask values of URL parameters with names of secrets: ``?apiKey=abc`` → ``?apiKey=***``."""
    return _PARAMETER.sub(rf"\1={_MASK}", text)


def shorten(text: str, max_length: int) -> str:
    """Cut ``text`` to ``max_length`` characters; an ellipsis is the last one of a cut text."""
    return text if len(text) <= max_length else f"{text[: max_length - 1]}…"


def config_secrets(config: object, *, public: bool = False) -> Iterator[str]:
    """Yield all values of a nested configuration that may be secret, including parts of URLs.

    public: values are ordinary words unless their names are names of secrets.
    """
    if isinstance(config, Mapping):
        for name, value in config.items():
            is_secret = _SECRET_NAME.search(str(name)) is not None
            is_public = not is_secret and (public or name in _PUBLIC_SECTIONS)
            yield from config_secrets(value, public=is_public)
    elif isinstance(config, Collection) and not isinstance(config, str):
        for value in config:
            yield from config_secrets(value, public=public)
    elif isinstance(config, str) and (url := _URL.match(config)):
        yield from _url_secrets(config, url)
    elif isinstance(config, (str, int)) and not isinstance(config, bool) and not public:
        yield str(config)


def _url_secrets(text: str, url: re.Match[str]) -> Iterator[str]:
    """Yield a URL's user name and password, the parts of its path and its parameters."""
    scheme, _, rest = url.groups()
    login = text.removeprefix(scheme).partition("@")[0] if "@" in text else ""
    yield from re.split(r"[:/]", login)
    yield login
    yield from (part for part in re.split(r"[/?&=#]", rest) if not part.startswith("{"))
