"""Reference of all settings."""

from __future__ import annotations

import subprocess
import sys

from kronos_stream.daemon.config.environment import read_settings
from kronos_stream.daemon.config.reference import describe_settings
from kronos_stream.daemon.config.settings import ENV_PREFIX, Settings


def test_reference_has_defaults_and_descriptions_of_all_settings() -> None:
    settings = {setting.name: setting for setting in describe_settings()}
    assert settings[f"{ENV_PREFIX}QUANTILES"].default == "0.05,0.25,0.5,0.75,0.95"
    assert settings[f"{ENV_PREFIX}ANCHOR"].default == "true"
    assert settings[f"{ENV_PREFIX}HTTP__PORT"].default == "8080"
    assert settings[f"{ENV_PREFIX}KAFKA__SASL_PASSWORD"].default == ""
    without = [one.name for one in settings.values() if not one.description.endswith(".")]
    assert without == []


def test_defaults_of_the_reference_can_be_set() -> None:
    own = ("FORECAST__", "HTTP__", "LOG__")
    base = {
        "SYMBOLS": "binance:A/B",
        "SINKS": "jsonl",
        "JSONL__PATH": "x",
        "SECRETS_DIR": "/nowhere",
    }
    defaults = {}
    for setting in describe_settings():
        name = setting.name.removeprefix(ENV_PREFIX)
        if setting.default and ("__" not in name or name.startswith(own)):
            defaults[name] = setting.default

    def read(values: dict[str, str]) -> Settings:
        return read_settings({ENV_PREFIX + name: value for name, value in values.items()})

    assert read(defaults | base) == read(base)


def test_reference_needs_no_heavy_library() -> None:
    code = (
        "import sys; from kronos_stream.daemon.config.reference import describe_settings; "
        "list(describe_settings()); "
        "print({'pandas', 'pyarrow', 'torch'} & sys.modules.keys() or 'none')"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "none\n"  # noqa: S603
