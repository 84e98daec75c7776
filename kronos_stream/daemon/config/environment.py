"""Settings out of the environment: variables, files with secrets, and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import EnvSettingsSource

from kronos_stream.daemon.config.settings import ENV_PREFIX, Settings, SettingsError, variable_name
from kronos_stream.daemon.config.text_files import read_text_file
from kronos_stream.interfaces import plugins
from kronos_stream.interfaces.plugins import ConnectorError
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.redaction import redact, register_secrets

_Model = TypeVar("_Model", bound=BaseModel)

_FILE_SUFFIX = "_FILE"

BROKER = "kafka"
"""What carries candles from role ingest to role forecast."""

_FOREIGN_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

_COLLECTION_TYPES = {tuple, list, set, frozenset}

_MAX_VALUE_LENGTH = 60
"""Characters of a value that are shown."""
_MAX_REASON_LENGTH = 400
"""Of why it will not do, which may repeat it."""

# What Kubernetes tells every container about a Service whose name begins with kronos-stream.
_KUBERNETES_SERVICE = re.compile(r"(.*_)?SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)")
_KUBERNETES_PORT = re.compile(r"(.*_)?PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")
_KUBERNETES_URL = ("tcp://", "udp://", "sctp://")


def read_settings(environ: Mapping[str, str], *, live: bool = True) -> Settings:
    """The settings that ``environ`` asks for, checked. Raises SettingsError with all problems.

    A variable with an empty value counts as not set. Secrets may stand in files: one whose path
    is the value of a connector's variable with ``_FILE`` behind it, or one in the secrets folder
    that is called like the variable.

    live: False for a replay, which needs neither symbols nor a sink.
    """
    given = _read_variables(environ)
    settings = _parse(Settings, given)
    problems = list(_find_role_conflicts(settings)) if live else []
    venues: dict[str, None] = {}
    if live and settings.role != "forecast":
        try:
            venues = dict.fromkeys(entry.venue for entry in settings.watchlist())
        except SettingsError as error:
            raise SettingsError([*error.problems, *problems]) from None
    for venue in venues if settings.role == "ingest" else ():
        if venue.partition(".")[0] == BROKER:
            problems.append(
                f"{variable_name('symbols')}: {variable_name('role')}=ingest cannot take candles from the "
                f"topics that it writes to; name other venues than {venue}"
            )
    options: dict[str, Any] = {}
    for field, load, wanted in (
        ("symbols", plugins.load_source, venues),
        ("sinks", lambda name: (name, plugins.load_sink(name)), settings.sinks),
        (
            "role",
            lambda name: (name, plugins.load_relay(name)),
            _required_relays(settings, live=live),
        ),
    ):
        for asked in wanted:
            try:
                name, connector = load(asked)
                options[name] = _parse(connector.options, given, name)
            except ConnectorError as error:
                problems.append(f"{variable_name(field)}: {error}")
            except SettingsError as error:
                problems.extend(error.problems)
    if problems:
        raise SettingsError(list(dict.fromkeys(problems)))
    return settings.model_copy(update={"options": options})


def read_options(name: str, environ: Mapping[str, str]) -> Any:  # noqa: ANN401
    """What ``environ`` tells the connector ``name``: its options. Raises SettingsError."""
    try:
        kind = plugins.options_type(name)
    except ConnectorError as error:
        raise SettingsError(str(error)) from error
    if kind is None:
        raise SettingsError(f"no connector is called {name}")
    return _parse(kind, _read_variables(environ), name)


def candle_timeframes(environ: Mapping[str, str]) -> Sequence[Timeframe]:
    """Those whose candle topics the role in ``environ`` needs. Raises SettingsError."""
    settings = _parse(Settings, _read_variables(environ))
    return () if settings.role == "all" else settings.candle_timeframes()


def redacted_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Our variables that are set, and to what; secrets withheld. Raises SettingsError."""
    shown = {}
    for name, value in _read_variables(environ).items():
        from_file = environ.get(name) != value
        withheld = from_file or _is_secret(name)
        shown[name] = "***" if withheld else _truncate(redact(value))
    return shown


class Setting(NamedTuple):
    """A line of help."""

    name: str
    """The variable."""
    default: str
    """As it would be set; empty if there is none."""
    description: str


def describe_settings() -> Iterator[Setting]:
    """Every setting there is, of the installed connectors, too."""
    yield from _describe_model(Settings)
    for name in sorted({*plugins.installed_names("sources"), *plugins.installed_names("sinks")}):
        with suppress(ConnectorError):  # said where it is asked for
            yield from _describe_model(plugins.options_type(name), name)


def _describe_model(model: Any, *path: str) -> Iterator[Setting]:  # noqa: ANN401 - a class of pydantic's
    for name, field in _variables(model, *path):
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


def _variables(model: Any, *path: str) -> Iterator[tuple[str, FieldInfo]]:  # noqa: ANN401
    """The variables of a model, and of the models in it."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _variables(field.annotation, *path, name)
        elif not (field.exclude and model is Settings):
            yield variable_name(*path, name), field


def _read_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Our variables that are set, those in files included. SettingsError for any unknown."""
    given = {
        name: value
        for name, value in environ.items()
        if value
        and name.upper().startswith(ENV_PREFIX)
        and not _is_kubernetes_variable(name, value)
    }
    folder = Path(
        given.get(variable_name("secrets_dir")) or Settings.model_fields["secrets_dir"].default
    )
    given = _read_secrets_dir(folder) | given
    known = _known_variables(given)
    problems: list[str] = []
    register_secrets(*(environ.get(name, "") for name in _FOREIGN_SECRETS))
    for name in [*given]:
        owner = name.removesuffix(_FILE_SUFFIX)
        if name in known:
            continue
        if "__" in owner and owner in known and name != owner:
            try:
                given.setdefault(owner, _read_secret(Path(given.pop(name)), name))
            except SettingsError as error:
                problems.extend(error.problems)
        else:
            problems.append(_unknown_variable_error(name, known))
    register_secrets(
        *(value for name, value in given.items() if name in known and _is_secret(name))
    )
    if problems:
        raise SettingsError(problems)
    return given


def _is_kubernetes_variable(name: str, value: str) -> bool:
    tail = name.removeprefix(ENV_PREFIX)
    return bool(
        _KUBERNETES_SERVICE.fullmatch(tail)
        or _KUBERNETES_PORT.fullmatch(tail)
        or (tail.endswith("PORT") and value.startswith(_KUBERNETES_URL))
    )


def _read_secrets_dir(folder: Path) -> dict[str, str]:
    """Files called like variables, in either case."""
    name = variable_name("secrets_dir")
    try:
        files = [path for path in folder.iterdir() if path.name.upper().startswith(ENV_PREFIX)]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SettingsError(f"{name}: {folder}: {error.strerror}") from None
    texts = {path.name.upper(): _read_secret(path, name) for path in sorted(files)}
    return {owner: text for owner, text in texts.items() if text}


def _read_secret(path: Path, name: str) -> str:
    """A secret, which ``name`` leads to: a file's text without the line end that editors add."""
    try:
        return read_text_file(path).removesuffix("\n").removesuffix("\r")
    except ValueError as error:
        raise SettingsError(f"{name}: {path}: {error}") from None


def _known_variables(given: Iterable[str]) -> set[str]:
    """The variables there are; of connectors, those that are spoken to."""
    known = {name for name, _ in _variables(Settings)}
    others = {name.removeprefix(ENV_PREFIX) for name in given if name not in known}
    for connector in sorted({name.partition("__")[0].lower() for name in others if "__" in name}):
        try:
            options = plugins.options_type(connector)
        except ConnectorError as error:
            raise SettingsError(f"{variable_name(connector)}__*: {error}") from error
        if options is not None:
            known |= {name for name, _ in _variables(options, connector)}
    return known


def _unknown_variable_error(name: str, known: Collection[str]) -> str:
    names = [one.removeprefix(ENV_PREFIX) for one in known]
    near = get_close_matches(name.upper().removeprefix(ENV_PREFIX), sorted(names), n=1, cutoff=0.7)
    cure = f"did you mean {ENV_PREFIX}{near[0]}?" if near else "kronos-stream run --help lists them"
    return f"{name}: there is no such setting; {cure}"


def _required_relays(settings: Settings, *, live: bool) -> Sequence[str]:
    """What carries candles between the roles, where there are several."""
    return (BROKER,) if live and settings.role != "all" else ()


def _find_role_conflicts(settings: Settings) -> Iterator[str]:
    """What does not go with the role."""
    role = f"{variable_name('role')}={settings.role}"
    if settings.role != "ingest" and not settings.sinks:
        yield _missing_sinks_error()
    if settings.role == "ingest" and settings.sinks:
        yield (
            f"{variable_name('sinks')}: {role} writes candles to Kafka, and no forecasts; unset it, or "
            "set it where forecasts are made"
        )
    if settings.role == "forecast" and (settings.symbols or settings.symbols_file):
        yield (
            f"{variable_name('symbols' if settings.symbols else 'symbols_file')}: {role} forecasts what "
            f"is in the candle topics of {variable_name('timeframes')}; unset it, or set it where "
            f"{variable_name('role')}=ingest"
        )


def _missing_sinks_error() -> str:
    return (
        f"{variable_name('sinks')} is empty, so forecasts would go nowhere: set it to any of "
        f"{','.join(plugins.installed_names('sinks'))}"
    )


def _is_secret(name: str) -> bool:
    """Whether a variable's value is never shown."""
    fields = dict(_variables(Settings))
    connector = name.removeprefix(ENV_PREFIX).partition("__")[0].lower()
    if name not in fields and (options := plugins.options_type(connector)) is not None:
        fields |= dict(_variables(options, connector))
    kind = fields[name].annotation
    return SecretStr in {kind, *get_args(kind)}


class _VariablesSource(EnvSettingsSource):
    """A model's variables, out of those that are given; lists with commas in place of JSON."""

    def __init__(self, model: Any, given: Mapping[str, str], *path: str) -> None:  # noqa: ANN401
        super().__init__(model, env_prefix=variable_name(*path, ""), env_nested_delimiter="__")
        self.env_vars = {name.lower(): value for name, value in given.items()}

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: str) -> Any:  # noqa: ANN401, ARG002
        if get_origin(field.annotation) not in _COLLECTION_TYPES:
            return value
        return [part.strip() for part in value.split(",") if part.strip()]


def _parse(kind: type[_Model], given: Mapping[str, str], *path: str) -> _Model:
    try:
        return kind(**_VariablesSource(kind, given, *path)())
    except ValidationError as error:
        raise SettingsError(_format_errors(error, given, *path)) from None


def _format_errors(error: ValidationError, given: Mapping[str, str], *path: str) -> list[str]:
    """A line per variable. Values of connectors are not repeated: they may hold secrets."""
    lines: dict[str, str] = {}
    for fault in error.errors(include_url=False, include_input=False):
        within = [part for part in fault["loc"] if isinstance(part, str)]
        name = variable_name(*path, *within) if within else variable_name(*path, "*")
        reason = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
        reason = reason if len(reason) <= _MAX_REASON_LENGTH else f"{reason[:_MAX_REASON_LENGTH]}…"
        line = f"{name}: {reason}"
        if fault["type"] == "missing":
            line = f"{name} is not set, and has no default"
        elif name in given and not path and not _is_secret(name):
            line = f"{name}={_truncate(given[name])}: {reason}"
        lines.setdefault(name, line)
    return list(lines.values())


def _truncate(value: str) -> str:
    return value if len(value) <= _MAX_VALUE_LENGTH else f"{value[:_MAX_VALUE_LENGTH]}…"
