"""The wheel: complete, and working outside the checkout."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FOLDERS = {"kronos_stream": ROOT / "kronos_stream", "kronos_connectors": ROOT / "connectors"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel, built from a copy so that the checkout stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = ["pyproject.toml", "README.md", "LICENSE", "kronos_stream", "connectors"]
    copy = ["cp", "-r", *(str(ROOT / name) for name in names), str(source)]
    subprocess.run(copy, check=True)
    _pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(source))
    (built,) = out.glob("*.whl")
    return built


def test_packages_are_those_of_the_checkout() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    assert sorted(listed["packages"]) == sorted(_packages())


def test_wheel_contains_all_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        (points,) = (name for name in packed if name.endswith(".dist-info/entry_points.txt"))
        entries = configparser.ConfigParser()
        entries.read_string(archive.read(points).decode())
    wanted = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in folder.rglob("*")
        if path.is_file() and (path.suffix == ".py" or path.name == "py.typed")
    }
    checkpoints = ROOT / "kronos_stream" / "checkpoints"
    wanted |= {
        path.relative_to(ROOT).as_posix() for path in checkpoints.rglob("*") if path.is_file()
    }
    assert wanted - packed == set()
    assert dict(entries["console_scripts"]) == {"kronos-stream": "kronos_stream.cli:main"}
    assert {"binance", "replay"} <= set(entries["kronos_stream.sources"])
    assert {"jsonl", "kafka"} <= set(entries["kronos_stream.sinks"])


def test_demo_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    _pip("install", "--no-deps", "--target", str(target), str(wheel))
    environ = {k: v for k, v in os.environ.items() if not k.startswith("KRONOS_")}
    environ["PYTHONPATH"] = str(target)  # before the checkout, which is installed for editing
    where = [sys.executable, "-P", "-c", "import kronos_stream, kronos_connectors as c; "]
    where[-1] += "print(kronos_stream.__file__, c.__file__)"
    imported = subprocess.run(
        where, cwd=tmp_path, env=environ, check=True, capture_output=True, text=True
    )
    assert all(path.startswith(str(target)) for path in imported.stdout.split())
    demo = [sys.executable, "-P", str(target / "bin" / "kronos-stream"), "demo"]
    shown = subprocess.run(
        [*demo, "--seconds", "5", "--symbols", "5", "--json"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert len(json.loads(shown.stdout)["by_series"]) == 5


def _packages() -> list[str]:
    return [
        ".".join([package, *path.relative_to(folder).parts])
        for package, folder in FOLDERS.items()
        for path in [folder, *folder.rglob("*")]
        if path.is_dir() and any(path.glob("*.py"))
    ]


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
