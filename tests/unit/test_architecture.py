"""Import rules of docs/architecture.md: one direction, no cycles, few dependencies."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.support.paths import ROOT

_BASE = {"atomic", "backoff", "channels", "errors", "redaction"}
"""Base modules, which import nothing else of this project."""

_ALLOWED: Mapping[str, set[str]] = {
    "market": set(),
    "bars": {"market"},
    "interfaces": {"market"},
    "model": set(),
    "engine": {"model", "market"},
    "forecast": {"bars", "interfaces", "market"},
    "evaluation": {"forecast", "market"},
    "testing": {"market"},
    "training": {"engine", "evaluation", "market", "model", "testing"},
    "compat": {"engine", "model", "training"},
    "client": {"forecast", "interfaces", "market"},
    "daemon": {"bars", "engine", "forecast", "interfaces", "market", "model"},
}
"""Folders of the core, and the folders that each may import beside the base modules.

``commands`` and ``cli`` put the program together and may import everything.
"""

_COMPUTE_LIBRARIES = {"numpy", "safetensors", "torch"}
_OPTIONAL_LIBRARIES = {"huggingface_hub"}
"""Imported inside the function that downloads checkpoints."""


def _module_name(path: str) -> str:
    parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
    return ".".join(["kronos_connectors", *parts[1:]] if parts[0] == "connectors" else parts)


_SOURCES = {
    _module_name(str(path.relative_to(ROOT))): ast.parse(path.read_text())
    for package in ("kronos_stream", "connectors")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def _imports(name: str, *, top_level: bool = False) -> Iterator[str]:
    """Absolute names that a module imports; of ours, down to the module."""
    tree = _SOURCES[name]
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            assert node.module is not None
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                yield member if member in _SOURCES else node.module


def _folder(name: str) -> str:
    """First folder or module below the package: ``kronos_stream.bars.window`` is in ``bars``."""
    return name.split(".")[1] if "." in name else name


def _core_modules(folder: str) -> list[str]:
    return [
        name for name in _SOURCES if name.startswith("kronos_stream.") and _folder(name) == folder
    ]


@pytest.mark.parametrize("folder", sorted(_ALLOWED))
def test_folders_import_only_the_folders_below_them(folder: str) -> None:
    allowed = _ALLOWED[folder] | _BASE | {folder, "kronos_stream"}
    modules = _core_modules(folder)
    assert modules
    wrong = [
        f"{name} imports {target}"
        for name in modules
        for target in _imports(name)
        if target.startswith("kronos_stream") and _folder(target) not in allowed
    ]
    assert not wrong


def test_every_folder_of_the_core_has_a_rule() -> None:
    folders = {_folder(name) for name in _SOURCES if name.startswith("kronos_stream.")}
    assert folders == _ALLOWED.keys() | _BASE | {"__main__", "cli", "commands"}


@pytest.mark.parametrize("module", sorted(_BASE))
def test_base_modules_import_nothing_of_the_project(module: str) -> None:
    assert not [one for one in _imports(f"kronos_stream.{module}") if one.startswith("kronos")]


def test_the_core_imports_no_connector() -> None:
    wrong = [
        f"{name} imports {target}"
        for name in _SOURCES
        if name.startswith("kronos_stream") and _folder(name) != "commands"
        for target in _imports(name)
        if target.startswith("kronos_connectors")
    ]
    assert not wrong


def test_connectors_import_interfaces_and_values_only() -> None:
    allowed = {"forecast", "interfaces", "market"} | _BASE
    wrong = [
        f"{name} imports {target}"
        for name in _SOURCES
        if name.startswith("kronos_connectors")
        for target in _imports(name)
        if target.startswith("kronos_stream") and _folder(target) not in allowed
    ]
    assert not wrong


@pytest.mark.parametrize("folder", ["model", "engine"])
def test_model_and_engine_need_torch_numpy_and_safetensors_alone(folder: str) -> None:
    for name in _core_modules(folder):
        for top_level, allowed in (
            (True, _COMPUTE_LIBRARIES),
            (False, _COMPUTE_LIBRARIES | _OPTIONAL_LIBRARIES),
        ):
            found = {target.split(".")[0] for target in _imports(name, top_level=top_level)}
            assert found - {"kronos_stream"} - sys.stdlib_module_names <= allowed, name


@pytest.mark.parametrize("depth", [2, 3, None], ids=["packages", "folders", "modules"])
def test_imports_have_no_cycles(depth: int | None) -> None:
    """Of top-level folders, of all folders, of modules."""
    graph: dict[str, set[str]] = {}
    for name in _SOURCES:
        here = ".".join(name.split(".")[:depth])
        there = (".".join(target.split(".")[:depth]) for target in _imports(name))
        ours = {target for target in there if target.startswith("kronos_")}
        graph.setdefault(here, set()).update(ours - {here})
    # The package's own __init__ offers names of the engine lazily; that is no cycle.
    graph.pop("kronos_stream", None)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
