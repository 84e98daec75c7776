"""Option types shared by the commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


class ParsedType(click.ParamType[Any]):
    """A value parsed by a function whose ValueError is the error message."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
