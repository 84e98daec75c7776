"""The Helm chart: rendered by helm, validated by kubeconform, and read as a kubelet would."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kronos_stream.daemon.config.settings import ENV_PREFIX
from tests.support.certificates import CertificateAuthority
from tests.support.paths import ROOT

CHART = ROOT / "deploy/kubernetes/kronos-stream"
TOOLS = ROOT / "build/deploy"
VALUES = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*.yaml"))
VERSIONS = ("1.27.0", "1.37.0")
"""Versions of Kubernetes: the oldest that the chart allows, and the newest with schemas."""

SECRETS: dict[str, dict[str, str]] = {
    "kronos-stream": {
        f"{ENV_PREFIX}KAFKA__SASL_PASSWORD": "kafka's",
        f"{ENV_PREFIX}MQTT__PASSWORD": "mosquitto's",
        f"{ENV_PREFIX}HTTP__TOKEN": "0123456789abcdef",
    },
    "hub": {"token": "hf_"},
}
"""Contents of the Secrets that the values in ci/ name; :func:`issue_certificates` adds some."""

Object = dict[str, Any]
"""An object of Kubernetes, or a part of one."""


class Chart(NamedTuple):
    """The chart, rendered by helm."""

    folder: Path = CHART

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [TOOLS / "helm", *arguments], capture_output=True, text=True, check=False
        )

    def text(self, values: str, *settings: str) -> str:
        options = list(chain.from_iterable(("--set", setting) for setting in settings))
        done = self.template(values, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def template(self, values: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        file = str(CHART / f"ci/{values}-values.yaml")
        release = ["x", str(self.folder), "--namespace", "bots", "--kube-version", VERSIONS[-1]]
        return self.run("template", *release, "--values", file, *arguments)

    def objects(self, values: str, *settings: str) -> list[Object]:
        return parse(self.text(values, *settings))


def parse(text: str) -> list[Object]:
    """Objects of a YAML stream; libyaml is faster, and the dashboard is long."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [item for item in yaml.load_all(text, loader) if item]


def conform(text: str, version: str) -> tuple[dict[str, int], str]:
    """Validate objects with kubeconform: numbers of valid and invalid ones, and its output."""
    folders = "{{.NormalizedKubernetesVersion}}/", ""
    schemas = [
        f"{TOOLS}/schemas/{folder}{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json"
        for folder in folders
    ]
    locations = chain.from_iterable(("-schema-location", schema) for schema in schemas)
    options = ["-strict", "-summary", "-output", "json", "-kubernetes-version", version]
    done = subprocess.run(
        [TOOLS / "kubeconform", *options, *locations, "-"],
        input=text, capture_output=True, text=True, check=False,
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert (done.returncode == 0) == (not result["resources"])
    return result["summary"], done.stdout


def kinds(objects: list[Object], *wanted: str) -> list[Object]:
    """Objects of these kinds."""
    return [item for item in objects if item["kind"] in wanted]


def pods(objects: list[Object]) -> Iterator[tuple[str, Object, Object]]:
    """Role, metadata and spec of each pod."""
    for item in kinds(objects, "StatefulSet", "Deployment", "Job"):
        template = item["spec"]["template"]
        role = template["metadata"]["labels"]["app.kubernetes.io/component"]
        yield role, template["metadata"], template["spec"]


def container_environment(spec: Object, objects: list[Object], folder: Path) -> dict[str, str]:
    """Environment that a kubelet would give to the container of a pod.

    Its volumes are written to ``folder``, and paths in the environment lead there.
    """
    (container,) = spec["containers"]
    maps = {item["metadata"]["name"]: item["data"] for item in kinds(objects, "ConfigMap")}
    environ: dict[str, str] = {}
    for source in container.get("envFrom", []):
        ((kind, reference),) = source.items()
        environ |= (maps if kind == "configMapRef" else SECRETS)[reference["name"]]
    for variable in container.get("env", []):
        environ[variable["name"]] = variable.get("value") or _resolve(variable, container)
    volumes = {volume.pop("name"): volume for volume in map(dict, spec["volumes"])}
    for mount in container["volumeMounts"]:
        target = folder / mount["mountPath"].strip("/").replace("/", "-")
        target.mkdir(parents=True)
        volume = volumes.get(mount["name"], {})
        for name, text in _files(volume, maps).items():
            (target / name).write_text(text, "utf-8")
        prefix = re.compile(rf"{re.escape(mount['mountPath'])}(?=/|$)")
        environ = {name: prefix.sub(str(target), value) for name, value in environ.items()}
    return environ


def _resolve(variable: Object, container: Object) -> str:
    if field := variable["valueFrom"].get("resourceFieldRef"):
        assert field["resource"] == "requests.cpu"
        cores = container["resources"]["requests"]["cpu"]
        milli = int(cores[:-1]) if cores.endswith("m") else 1_000 * float(cores)
        return str(ceil(milli / 1_000))
    reference = variable["valueFrom"]["secretKeyRef"]
    return SECRETS[reference["name"]][reference["key"]]


def _files(volume: Object, maps: dict[str, dict[str, str]]) -> dict[str, str]:
    if "configMap" in volume:
        return maps[volume["configMap"]["name"]]
    if "secret" not in volume:
        return {}
    keys = SECRETS[volume["secret"]["secretName"]]
    items = volume["secret"].get("items", [{"key": key, "path": key} for key in keys])
    return {item["path"]: keys[item["key"]] for item in items}


def issue_certificates(folder: Path) -> None:
    """Add certificates to SECRETS."""
    authority = CertificateAuthority(folder)
    ours = authority.issue("kronos")
    SECRETS["kafka-cluster-ca-cert"] = {"ca.crt": authority.file.read_text("utf-8")}
    SECRETS["kronos-user"] = {
        "user.crt": ours.certificate.read_text("utf-8"),
        "user.key": ours.key.read_text("utf-8"),
        "user.p12": "other things",
    }
