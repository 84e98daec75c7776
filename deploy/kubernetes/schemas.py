"""Arrange JSON schemas in the layout of kubeconform: schemas.py FOLDER WHEEL MODULE...

WHEEL is the wheel of kubernetes-validate, which contains the schemas of Kubernetes. The modules are
Go modules that together contain all CRDs listed below and the schema of compose.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import yaml

# The oldest version that the chart allows, and the newest with schemas.
VERSIONS = ("1.27.0", "1.37.0")

CRDS = (
    "config/crd/bases/keda.sh_scaledobjects.yaml",
    "config/crd/bases/keda.sh_triggerauthentications.yaml",
    "example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml",
    "example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml",
)
COMPOSE = "schema/compose-spec.json"


def main(folder: Path, wheel: Path, modules: list[Path]) -> None:
    """Write FOLDER/v1.37.0/deployment-apps-v1.json and so on; CRDs and compose beside them."""
    folder.mkdir(parents=True)
    with ZipFile(wheel) as archive:
        for version in VERSIONS:
            _kubernetes(archive, version, folder / f"v{version}")
    for name in (*CRDS, COMPOSE):
        (path,) = (module / name for module in modules if (module / name).is_file())
        if name == COMPOSE:
            shutil.copyfile(path, folder / path.name)
        else:
            _crd(path, folder)


def _kubernetes(archive: ZipFile, version: str, folder: Path) -> None:
    """Write the strict schemas, which reject unknown fields."""
    folder.mkdir()
    inside = f"kubernetes_validate/kubernetes-json-schema/v{version}-local-strict/"
    for name in archive.namelist():
        if name.startswith(inside) and name.endswith(".json"):
            text = archive.read(name).decode()
            # Their identifiers are web addresses; here they are files in one folder.
            text = text.replace('"/api/_definitions.json#', '"_definitions.json#')
            text = re.sub(r',\s*"\$id": "https://kubernetes.io/[^"]*"', "", text)
            (folder / name.removeprefix(inside)).write_text(text, "utf-8")


def _crd(path: Path, folder: Path) -> None:
    """Write a strict schema for each version of a custom resource."""
    definition = yaml.safe_load(path.read_text("utf-8"))["spec"]
    kind, group = definition["names"]["kind"].lower(), definition["group"].partition(".")[0]
    for version in definition["versions"]:
        schema = version["schema"]["openAPIV3Schema"]
        _forbid_unknown(schema)
        target = folder / f"{kind}-{group}-{version['name']}.json"
        target.write_text(json.dumps(schema), "utf-8")


def _forbid_unknown(schema: Any) -> None:  # noqa: ANN401 - any part of one
    """Reject unknown fields, which a server would drop."""
    if isinstance(schema, dict):
        closed = "properties" in schema and "additionalProperties" not in schema
        if closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema["additionalProperties"] = False
        parts = [value for name, value in schema.items() if name != "properties"]
        parts += schema.get("properties", {}).values()
    else:
        parts = schema if isinstance(schema, list) else []
    for part in parts:
        _forbid_unknown(part)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
