"""Registry of connectors: entry points of installed packages."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeVar

from kronos_stream.interfaces.feed import FeedConnector
from kronos_stream.interfaces.sink import RelayConnector, SinkConnector
from kronos_stream.interfaces.source import SourceConnector

Group = Literal["sources", "sinks", "relays", "feeds"]

_Connector = TypeVar("_Connector", SourceConnector, SinkConnector, RelayConnector, FeedConnector)


_EXAMPLE_VENUE = "kraken"


class ConnectorError(Exception):
    """A connector is not installed or not usable; one clause."""


def installed_names(group: Group) -> list[str]:
    """Names of the installed connectors of a group."""
    return sorted(_entry_points(group))


def load_source(venue: str) -> tuple[str, SourceConnector]:
    """Load the connector of a venue; returns its name, too. Raises ConnectorError."""
    for name in (venue, venue.partition(".")[0]):
        if name in _entry_points("sources"):
            return name, _load("sources", name, SourceConnector)
    others = ""
    for name in installed_names("sources"):
        with suppress(ConnectorError):  # a broken connector of another venue
            connector = _load("sources", name, SourceConnector)
            venues = connector.venues()
            if venue in venues:
                return name, connector
            if venues:
                example = _EXAMPLE_VENUE if _EXAMPLE_VENUE in venues else min(venues)
                others += f", and every exchange of {name}, such as {example}"
    raise ConnectorError(f"{_not_installed('sources', venue)}{others}")


def load_sink(name: str) -> SinkConnector:
    """Load the connector of a sink. Raises ConnectorError."""
    return _load("sinks", name, SinkConnector)


def load_relay() -> tuple[str, RelayConnector]:
    """Name and connector of the installed sink of role ingest. Raises ConnectorError."""
    return _load_only("relays", RelayConnector)


def load_feed() -> tuple[str, FeedConnector]:
    """Name and connector of the installed feed of role forecast. Raises ConnectorError."""
    return _load_only("feeds", FeedConnector)


def options_type(name: str) -> type[Any] | None:
    """Options model of the source or sink called ``name``; None if there is neither.

    A source and a sink of one name share their options. Raises ConnectorError.
    """
    if name in _entry_points("sources"):
        return load_source(name)[1].options
    return load_sink(name).options if name in _entry_points("sinks") else None


@cache
def _entry_points(group: Group) -> dict[str, EntryPoint]:
    # Names become parts of environment variables: lower-case words only.
    return {
        point.name: point
        for point in entry_points(group=f"kronos_stream.{group}")
        if point.name.isidentifier() and point.name.islower()
    }


def _not_installed(group: Group, name: str) -> ConnectorError:
    return ConnectorError(
        f"none of the {group} is called {name!r}; there are {', '.join(installed_names(group))}"
    )


def _load_only(group: Group, kind: type[_Connector]) -> tuple[str, _Connector]:
    names = installed_names(group)
    if len(names) != 1:
        raise ConnectorError(
            f"exactly one of the {group} must be installed; there are {', '.join(names) or 'none'}"
        )
    return names[0], _load(group, names[0], kind)


def _load(group: Group, name: str, kind: type[_Connector]) -> _Connector:
    point = _entry_points(group).get(name)
    if point is None:
        raise _not_installed(group, name)
    try:
        connector = point.load()
    except (ImportError, AttributeError) as error:
        raise ConnectorError(f"{point.value} cannot be loaded: {error}") from error
    if not isinstance(connector, kind):
        raise ConnectorError(f"{point.value} is not a {kind.__name__}")
    return connector
