"""Snapshots of metrics, settings, commands, entry points, topics, noise keys and exit codes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint, distribution
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click
import orjson
import pytest
from click.testing import CliRunner
from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel, SecretStr

from kronos_connectors.kafka.topics import required_topics, topics_for_record
from kronos_stream.cli import cli, main
from kronos_stream.daemon.config.settings import Settings
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.engine.noise import noise_key
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from tests.support.snapshots import check_snapshot

_PREFIX = "KRONOS_STREAM_"
_BTC = Series.parse("binance:BTC/USDT:1m")
_MACHINE_DEPENDENT = {
    "THREADS": "(one less than the usable cores)",
    "STATE_FILE": "(in the state folder of the system or the user)",
    "MQTT__CLIENT_ID": "(kronos-stream- and the host's name)",
}


def test_metrics() -> None:
    """Names, types, labels and buckets; and what a new process shows before anything happens."""
    metrics = Metrics()
    found = {id(one): one for one in metrics.registry._names_to_collectors.values()}
    lines = []
    for metric in found.values():
        if isinstance(metric, MetricWrapperBase):
            buckets = getattr(metric, "_kwargs", {}).get("buckets", ())
            shown = f", buckets {' '.join(f'{one:g}' for one in buckets)}" if buckets else ""
            labels = ", ".join(metric._labelnames)
            lines.append(f"{metric._name} {metric._type}, labels ({labels}){shown}\n")
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    lines = [*sorted(lines), "\nwith labels from the start\n"]
    lines += sorted(
        f"{one.name} {dict(one.labels)} {one.value:g}\n"
        for one in samples
        if one.labels.keys() - {"le"} and not one.name.endswith("_created")
    )
    check_snapshot("metrics.txt", "".join(lines))


def test_settings() -> None:
    models: dict[str, type[BaseModel]] = {"": Settings}
    for point in _entry_points():
        if point.group in {"kronos_stream.sources", "kronos_stream.sinks"}:
            models[f"{point.name.upper()}__"] = point.load().options
    lines = [line for prefix, model in models.items() for line in _settings(model, prefix)]
    check_snapshot("settings.txt", "".join(lines))


def test_settings_listed_by_help() -> None:
    done = CliRunner().invoke(cli, ["run", "--help"], terminal_width=100)
    environment = done.output.partition("\nEnvironment:\n")[2]
    names = re.findall(rf"^  ({_PREFIX}\w+)", environment, re.MULTILINE)
    check_snapshot("settings-help.txt", "".join(f"{name}\n" for name in names))


def test_commands() -> None:
    check_snapshot("commands.txt", "".join(_commands(cli, "kronos-stream")))


def test_entry_points() -> None:
    points = sorted((point.group, point.name) for point in _entry_points())
    check_snapshot("entry-points.txt", "".join(f"{group}: {name}\n" for group, name in points))


def test_topics() -> None:
    options = {point.name: point.load().options for point in _entry_points("sinks")}
    kafka = options["kafka"](bootstrap_servers="localhost:9092", topic_prefix="prefix")
    lines = [
        f"kafka {topic.name}: {topic.partitions} partitions, {topic.configs}\n"
        for topic in required_topics(kafka, [Timeframe.parse(text) for text in ("1m", "4h", "1M")])
    ]
    kinds: tuple[Literal["forecast", "removal", "deadletter", "candle"], ...]
    kinds = "forecast", "removal", "deadletter", "candle"
    lines += [
        f"kafka {one}: {', '.join(topics_for_record('prefix', one, _BTC.name))}\n" for one in kinds
    ]
    mqtt = options["mqtt"](url="mqtt://localhost", client_id="client")
    topics = mqtt.candle_template().for_series(_BTC), mqtt.forecast_template().for_series(_BTC)
    lines += [f"mqtt {topic}\n" for topic in (*topics, mqtt.deadletter_topic, mqtt.status())]
    channels = orjson.loads(CliRunner().invoke(cli, ["schema", "--asyncapi"]).stdout)["channels"]
    lines += [
        f"asyncapi {one['address']}: {', '.join(one['messages'])}\n" for one in channels.values()
    ]
    check_snapshot("topics.txt", "".join(lines))


def test_noise_keys() -> None:
    made = [
        (0, _BTC.name, 1_718_712_000_000),
        (7, _BTC.name, 1_718_712_000_000),
        (-1, "b:\u20ac/X:1M", 0),
    ]
    check_snapshot("noise-keys.txt", "".join(f"{one}: {noise_key(*one)}\n" for one in made))


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(_PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(f"{_PREFIX}SECRETS_DIR", "/nowhere")
    monkeypatch.chdir(tmp_path)
    calls = (
        "", "--help", "--version", "nosuch", "schema", "schema --nosuch", "schema nosuch", "run",
        "run --help", "forecast missing.csv", "replay missing.csv", "topics check", "topics",
        "train", "doctor --nosuch",
    )  # fmt: skip
    lines = []
    for call in calls:
        with pytest.raises(SystemExit) as exited:
            main(call.split())
        lines.append(f"kronos-stream {call}: {exited.value.code}\n")
    check_snapshot("exit-codes.txt", "".join(lines))


def _entry_points(group: str = "") -> list[EntryPoint]:
    points = sorted(
        distribution("kronos-stream").entry_points, key=lambda one: (one.name, one.group)
    )
    return [one for one in points if one.group.endswith(group)]


def _settings(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _settings(kind, f"{prefix}{name.upper()}__")
        elif not field.exclude:
            full = f"{prefix}{name.upper()}"
            default = field.get_default(call_default_factory=True)
            shown = "(required)" if field.is_required() else _shown(default)
            limits = [repr(one) for one in field.metadata if repr(one)[0].isupper()]
            limits = [one for one in limits if not re.match("(After|Plain)Validator", one)]
            shown = _MACHINE_DEPENDENT.get(full, shown)
            yield f"{_PREFIX}{full}: {_kind(kind)} = {shown} {' '.join(limits)}".rstrip() + "\n"


def _shown(value: object) -> str:
    if isinstance(value, SecretStr):
        return "(secret)" if value.get_secret_value() else "(empty secret)"
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    ours = type(value).__module__.startswith("kronos_")  # written as text
    return str(value) if ours or isinstance(value, Path) else repr(value)


def _kind(annotation: Any) -> str:
    """A type in words; our own classes, which are written as text, have none."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(repr, parts))
    if origin in {Union, UnionType}:
        return " | ".join(map(_kind, parts))
    if origin is tuple:
        return f"list of {_kind(parts[0])}"
    if origin is not None:
        return _kind(parts[0])
    ours = annotation.__module__.startswith("kronos_")
    return "text" if ours else "none" if annotation is type(None) else str(annotation.__name__)


def _commands(command: click.Command, path: str) -> Iterator[str]:
    yield f"{path}\n"
    for param in command.params:
        names = " ".join((*param.opts, *param.secondary_opts))
        choices = list(param.type.choices) if isinstance(param.type, click.Choice) else ""
        flags = [name for name in ("is_flag", "multiple", "required") if getattr(param, name, None)]
        flags += [f"nargs {param.nargs}"] if param.nargs != 1 else []
        kind = "argument" if isinstance(param, click.Argument) else "option"
        yield f"    {kind} {names} {', '.join(flags)} {choices}".rstrip() + "\n"
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _commands(inner, f"{path} {name}")
