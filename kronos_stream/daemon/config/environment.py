"""Settings from environment variables and files of secrets, with clear error messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import EnvSettingsSource

from kronos_stream.daemon.config.reference import is_secret, variables
from kronos_stream.daemon.config.settings import ENV_PREFIX, Settings, SettingsError, variable_name
from kronos_stream.daemon.config.text_files import read_text_file
from kronos_stream.interfaces import plugins
from kronos_stream.interfaces.plugins import ConnectorError
from kronos_stream.interfaces.sink import SinkConnector
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.redaction import redact, register_secrets, shorten

_Model = TypeVar("_Model", bound=BaseModel)

_FILE_SUFFIX = "_FILE"

_FOREIGN_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

_COLLECTION_TYPES = {tuple, list, set, frozenset}

_MAX_VALUE_LENGTH = 60
_MAX_REASON_LENGTH = 400
"""Limit for an error message, which may repeat the value."""

_EXPECTED = {
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_parsing": "expected a number",
    "bool_parsing": "expected true or false",
}
"""Reasons by pydantic's type of problem."""

# Variables that Kubernetes sets in every container for a Service named kronos-stream-*.
_KUBERNETES_SERVICE = re.compile(r"(.*_)?SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)")
_KUBERNETES_PORT = re.compile(r"(.*_)?PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")
_KUBERNETES_URL = ("tcp://", "udp://", "sctp://")


def read_settings(environ: Mapping[str, str], *, live: bool = True) -> Settings:
    """Parse and check the settings in ``environ``. Raises SettingsError with all problems.

    A variable with an empty value counts as not set. Secrets may be in files: a variable of a
    connector with the suffix ``_FILE`` names one, and files in the secrets folder are named like
    variables.

    live: False for a replay, which needs neither symbols nor sinks.
    """
    given = _read_variables(environ)
    settings = _parse(Settings, given)
    problems = list(_find_role_conflicts(settings)) if live else []
    venues: Collection[str] = ()
    if live and settings.role != "forecast":
        try:
            venues = dict.fromkeys(entry.venue for entry in settings.watchlist())
        except SettingsError as error:
            raise SettingsError([*error.problems, *problems]) from None
    if settings.role == "ingest":
        problems += _find_circular_venues(venues)
    options: dict[str, Any] = {}
    for field, load in _connector_loaders(settings, venues, live=live):
        try:
            name, connector = load()
            options[name] = _parse(connector.options, given, name)
        except ConnectorError as error:
            problems.append(f"{variable_name(field)}: {error}")
        except SettingsError as error:
            problems.extend(error.problems)
    if problems:
        raise SettingsError(list(dict.fromkeys(problems)))
    return settings.model_copy(update={"options": options})


def read_options(name: str, environ: Mapping[str, str]) -> Any:  # noqa: ANN401
    """Parse the options of the connector ``name``. Raises SettingsError."""
    try:
        kind = plugins.options_type(name)
    except ConnectorError as error:
        raise SettingsError(str(error)) from error
    if kind is None:
        raise SettingsError(f"no connector is called {name}")
    return _parse(kind, _read_variables(environ), name)


def candle_timeframes(environ: Mapping[str, str]) -> Sequence[Timeframe]:
    """Timeframes that need a candle topic for the role in ``environ``. Raises SettingsError."""
    settings = _parse(Settings, _read_variables(environ))
    return () if settings.role == "all" else settings.candle_timeframes()


def redacted_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that are set, with secrets masked. Raises SettingsError."""
    shown = {}
    for name, value in _read_variables(environ).items():
        from_file = environ.get(name) != value
        hidden = from_file or is_secret(name)
        shown[name] = "***" if hidden else shorten(redact(value), _MAX_VALUE_LENGTH)
    return shown


def _connector_loaders(
    settings: Settings, venues: Iterable[str], *, live: bool
) -> Iterator[tuple[str, Callable[[], tuple[str, Any]]]]:
    """Setting that names a connector, and a function that returns its name and the connector."""
    for venue in venues:
        yield "symbols", partial(plugins.load_source, venue)
    for sink in settings.sinks:
        yield "sinks", partial(_load_sink, sink)
    if live and settings.role == "ingest":
        yield "role", plugins.load_relay
    elif live and settings.role == "forecast":
        yield "role", plugins.load_feed


def _load_sink(name: str) -> tuple[str, SinkConnector]:
    return name, plugins.load_sink(name)


def _read_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are set, including those in files.

    Raises SettingsError for unknown ones.
    """
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
    register_secrets(*(value for name, value in given.items() if name in known and is_secret(name)))
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
    """Return contents of files named like variables, in upper or lower case."""
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
    """Return a file's text without the line end that editors add. name: variable behind it."""
    try:
        return read_text_file(path).removesuffix("\n").removesuffix("\r")
    except ValueError as error:
        raise SettingsError(f"{name}: {path}: {error}") from None


def _known_variables(given: Iterable[str]) -> set[str]:
    """Names of the daemon's variables and of those of each connector that occurs in ``given``."""
    known = {name for name, _ in variables(Settings)}
    others = {name.removeprefix(ENV_PREFIX) for name in given if name not in known}
    for connector in sorted({name.partition("__")[0].lower() for name in others if "__" in name}):
        try:
            options = plugins.options_type(connector)
        except ConnectorError as error:
            raise SettingsError(f"{variable_name(connector)}__*: {error}") from error
        if options is not None:
            known |= {name for name, _ in variables(options, connector)}
    return known


def _unknown_variable_error(name: str, known: Collection[str]) -> str:
    names = [known_name.removeprefix(ENV_PREFIX) for known_name in known]
    near = get_close_matches(name.upper().removeprefix(ENV_PREFIX), sorted(names), n=1, cutoff=0.7)
    remedy = (
        f"did you mean {ENV_PREFIX}{near[0]}?" if near else "kronos-stream run --help lists them"
    )
    return f"{name}: there is no such setting; {remedy}"


def _find_role_conflicts(settings: Settings) -> Iterator[str]:
    """Settings that contradict the role."""
    role = f"{variable_name('role')}={settings.role}"
    if settings.role != "ingest" and not settings.sinks:
        yield (
            f"{variable_name('sinks')} is empty, so forecasts would go nowhere: set it to any of "
            f"{','.join(plugins.installed_names('sinks'))}"
        )
    if settings.role == "ingest" and settings.sinks:
        yield (
            f"{variable_name('sinks')}: {role} publishes candles, not forecasts; unset it, or set "
            "it where forecasts are made"
        )
    if settings.role == "forecast" and (settings.symbols or settings.symbols_file):
        name = variable_name("symbols" if settings.symbols else "symbols_file")
        yield (
            f"{name}: {role} forecasts all series in the candle topics of "
            f"{variable_name('timeframes')}; unset it, or set it where "
            f"{variable_name('role')}=ingest"
        )


def _find_circular_venues(venues: Iterable[str]) -> Iterator[str]:
    """Venues of role ingest whose candles come from where it publishes them."""
    relays = plugins.installed_names("relays")
    for venue in venues:
        if venue.partition(".")[0] in relays:
            yield (
                f"{variable_name('symbols')}: {variable_name('role')}=ingest cannot read candles "
                f"from the topics that it writes to; name other venues than {venue}"
            )


class _VariablesSource(EnvSettingsSource):
    """Values of a model's variables; lists are separated by commas instead of written as JSON."""

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
        raise SettingsError(_format_errors(error, kind, given, *path)) from None


def validation_reason(problem: ErrorDetails) -> str:
    """The reason of a problem of pydantic, without its prefixes and terms."""
    reason = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return _EXPECTED.get(problem["type"]) or shorten(reason, _MAX_REASON_LENGTH)


def _format_errors(
    error: ValidationError, kind: type[BaseModel], given: Mapping[str, str], *path: str
) -> list[str]:
    """One line per variable. Values of connectors' options are not shown: they may be secret."""
    lines: dict[str, str] = {}
    for problem in error.errors(include_url=False, include_input=False):
        within = [part for part in problem["loc"] if isinstance(part, str)]
        name = variable_name(*path, *within) if within else variable_name(*path, "*")
        reason = validation_reason(problem)
        line = f"{name}: {reason}"
        if problem["type"] == "missing":
            field = kind.model_fields.get(within[0]) if len(within) == 1 else None
            examples = field.examples if field is not None else None
            line = f"{name} is required" + (f": set it, such as {examples[0]}" if examples else "")
        elif name in given and not path and not is_secret(name):
            line = f"{name}={shorten(given[name], _MAX_VALUE_LENGTH)}: {reason}"
        lines.setdefault(name, line)
    return list(lines.values())
