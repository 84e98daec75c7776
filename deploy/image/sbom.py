"""Bill of materials of the daemon's dependencies, in CycloneDX: ``sbom.py PYTHON OUT``.

PYTHON is an interpreter with the daemon installed. Other packages of its environment, such as
development tools, are left out. Requires cyclonedx-bom in the environment that runs this script.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

_ROOT = Path(__file__).parents[2]
_PROJECT = "kronos-stream"
_FOLDERS = "import json, sys; print(json.dumps([path for path in sys.path if path]))"


def main(python: str, out: Path) -> int:
    """Write the file; return 1 if it is not valid CycloneDX. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "bom.json")
        _run([sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible",
              "--pyproject", str(_ROOT / "pyproject.toml"), "-o", str(whole), python])  # fmt: skip
        bom = json.loads(whole.read_text("utf-8"))
    needed = _needed(distributions(path=json.loads(_run([python, "-c", _FOLDERS]))))
    bom["components"] = [
        entry for entry in bom["components"] if canonicalize_name(entry["name"]) in needed
    ]
    kept = {bom["metadata"]["component"]["bom-ref"]}
    kept |= {entry["bom-ref"] for entry in bom["components"]}
    bom["dependencies"] = [
        entry | {"dependsOn": [other for other in entry.get("dependsOn", []) if other in kept]}
        for entry in bom["dependencies"]
        if entry["ref"] in kept
    ]
    text = json.dumps(bom, indent=1) + "\n"
    if fault := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        print(f"sbom: not valid: {fault}", file=sys.stderr)  # noqa: T201
        return 1
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, "utf-8")
    print(f"{out}: valid CycloneDX 1.6, {len(bom['components'])} components")  # noqa: T201
    return 0


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603


def _needed(installed: Iterable[Distribution]) -> set[NormalizedName]:
    """Collect all direct and indirect dependencies, including requested extras."""
    known = {canonicalize_name(each.metadata["Name"]): each for each in installed}
    found: set[tuple[NormalizedName, str]] = set()
    left = [(canonicalize_name(_PROJECT), "")]
    while left:
        name, extra = left.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for line in known[name].requires or []:
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                other = canonicalize_name(wanted.name)
                left += [(other, asked) for asked in ("", *wanted.extras)]
    return {name for name, _ in found}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
