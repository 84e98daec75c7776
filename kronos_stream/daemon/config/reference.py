"""Names, defaults and descriptions of all settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from kronos_stream.daemon.config.settings import ENV_PREFIX, Settings, variable_name
from kronos_stream.interfaces import plugins
from kronos_stream.interfaces.plugins import ConnectorError


class Setting(NamedTuple):
    """Help for one environment variable."""

    name: str
    default: str
    """In the notation of the variable; empty if there is none."""
    description: str


def describe_settings() -> Iterator[Setting]:
    """All settings, including those of installed connectors."""
    yield from _describe_model(Settings)
    for name in sorted({*plugins.installed_names("sources"), *plugins.installed_names("sinks")}):
        with suppress(ConnectorError):  # reported when it is used
            yield from _describe_model(plugins.options_type(name), name)


def variables(model: Any, *path: str) -> Iterator[tuple[str, FieldInfo]]:  # noqa: ANN401 - a pydantic class
    """Variables of a model and of the models nested in it. path: name of its connector, if any."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from variables(field.annotation, *path, name)
        elif not (field.exclude and model is Settings):
            yield variable_name(*path, name), field


def is_secret(name: str) -> bool:
    """True if the value of a variable must never be shown."""
    fields = dict(variables(Settings))
    connector = name.removeprefix(ENV_PREFIX).partition("__")[0].lower()
    if name not in fields and (options := plugins.options_type(connector)) is not None:
        fields |= dict(variables(options, connector))
    annotation = fields[name].annotation
    return SecretStr in {annotation, *get_args(annotation)}


def _describe_model(model: Any, *path: str) -> Iterator[Setting]:  # noqa: ANN401 - a pydantic class
    for name, field in variables(model, *path):
        default = field.get_default(call_default_factory=True)
        yield Setting(name, _format_default(default), " ".join((field.description or "").split()))


def _format_default(value: object) -> str:
    if value is None or value is PydanticUndefined or isinstance(value, SecretStr):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.15g}"
    return ",".join(map(_format_default, value)) if isinstance(value, tuple) else str(value)
